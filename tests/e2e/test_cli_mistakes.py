"""A user's mistake: one line, exit code 2, no traceback, nothing trained, finished runs unchanged."""

import json
import os
import shutil
from collections.abc import Callable

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine
from support.refused_commands import assert_refused, contents
from support.tiny_experiment import tiny
from tokenizers import Tokenizer, models

FILES: dict[str, str | bytes] = {
    "unknown_key.yaml": json.dumps(tiny(train={"stepps": 5})),
    "unknown_top.yaml": json.dumps(tiny(sedes=[0])),
    "unknown_axis.yaml": json.dumps(tiny(grid={"router": ["dense"], "train.stepps": [1, 2]})),
    "malformed.yaml": "base: {task: [\nfoo: : :",
    "tabs.yaml": "base:\n\t- a",
    "list.yaml": "- dense\n- switch",
    "empty.yaml": "",
    "binary.yaml": b"\xff\xfe\x00\x01" * 50,
    "tag.yaml": "base: !!python/object/apply:os.system ['touch hacked']\n",
    "twice.yaml": json.dumps(tiny(grid={"router": ["dense", "switch", "switch"]})),
    "cadence.yaml": json.dumps(tiny(grid={"train.eval_every": [1, 2]})),
    "duplicate_key.yaml": "seeds: [0]\nseeds: [1]\ngrid: {router: [dense]}\n",
    "no_baseline.yaml": json.dumps(tiny(baseline="dens")),
    "base_null.yaml": json.dumps(tiny() | {"base": None}),
    "base_number.yaml": json.dumps(tiny() | {"base": 5}),
    "arm_null.yaml": json.dumps(tiny(grid={"router": ["dense", None]})),
    "arm_number.yaml": json.dumps(tiny(grid={"router": ["dense", 5]})),
    "arm_without_label.yaml": json.dumps(
        tiny(grid={"arm": [{"label": "dense", "router": "dense"}, {"router": "hash"}]})
    ),
    "arm_unknown.yaml": json.dumps(tiny(grid={"arm": [{"label": "dense", "rooter": "dense"}]})),
    "vision.yaml": json.dumps({"base": {"task": {"name": "vision"}}, "grid": {"router": ["dense", "switch"]}}),
    "noncausal.yaml": json.dumps(tiny(grid={"router": ["dense", "expert_choice"]})),
    "bad.parquet": b"PAR1" + b"x" * 100,
    "empty.txt": b"",
    "columns.csv": "texts,dom\nhello,a\n" * 3,
    "short.txt": "hello world",
    "latin.txt": "é".encode("latin-1") * 500,
    "lossy.json": Tokenizer(models.BPE({"e": 0, "t": 1}, [])).to_str(),
    "unknown.json": Tokenizer(models.WordLevel({"e": 0})).to_str(),
    "a_file": "x",
    "syntax.py": "def f(:\n",
    "raises.py": "raise RuntimeError('boom\\nsecond line')\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "imports.py": "import nosuchmodule\n",
    "again.py": (ROOT / "moebench/routing/routers/switch.py").read_text(),
}

FILE_MISTAKES = {
    "unknown_key": ["train.stepps", "Did you mean 'steps'?"],
    "unknown_top": ["sedes", "Did you mean 'seeds'?"],
    "unknown_axis": ["train.stepps", "Did you mean 'steps'?"],
    "malformed": ["malformed.yaml", "line 2"],
    "tabs": ["tabs.yaml", "line 2"],
    "list": ["list.yaml", "mapping"],
    "empty": ["empty.yaml"],
    "binary": ["binary.yaml"],
    "tag": ["tag.yaml", "python/object"],
    "twice": ["twice.yaml", "'switch'", "twice; leave one out"],
    "cadence": ["cadence.yaml", "differ only in train.eval_every"],
    "duplicate_key": ["duplicate_key.yaml", "seeds"],
    "no_baseline": ["baseline", "'dens'", "Did you mean 'dense'?"],
    "base_null": ["base"],
    "base_number": ["base", "5"],
    "arm_null": ["router"],
    "arm_number": ["router", "5"],
    "arm_without_label": ["grid.arm", "label", "hash"],
    "arm_unknown": ["rooter", "Did you mean 'router'?"],
    "noncausal": ["router", "'expert_choice' is not causal", "allow_noncausal=true"],
    "missing": ["missing.yaml", "no such"],
}

OVERRIDE_MISTAKES = {
    "router.top_kk=2": ["router.top_kk", "Did you mean 'top_k'?"],
    "grid.router=[dense,swich]": ["router", "'swich'", "Did you mean 'switch'?"],
    "grid.router=[]": ["grid.router", "at least one"],
    "router.name=switch": ["router", "grid.router"],
    "router.losses.load_balanc=1": ["router.losses", "Did you mean 'load_balance'?"],
    "layout=every_m": ["layout", "'every_m'", "Did you mean 'every_n'?"],
    "task.name=langage": ["task", "'langage'", "Did you mean 'language'?"],
    "train.steps=abc": ["train.steps", "abc"],
    "train.steps=1.5": ["train.steps", "1.5"],
    "train.steps=1_000": ["train.steps", "'1_000'", "a whole number"],
    "allow_noncausal=yes": ["allow_noncausal", "'yes'", "true or false"],
    "task.data.tokenizer=lossy.json": ["'lossy.json' keeps", "% of the bytes of domain 'a'", "at least 99.9 %"],
    "task.data.tokenizer=unknown.json": ["'unknown.json' cannot encode", "[UNK]"],
    "task.data.path=a #b": ["task.data.path", "'a #b' does not exist"],
    "train.steps=": ["train.steps"],
    "train.steps=0": ["train.steps", "at least 1", "0"],
    "train.steps=[1": ["train.steps"],
    "train.steps=${nothing}": ["train.steps", "nothing"],
    "train.learning_rate=-1": ["train.learning_rate", "greater than 0", "-1"],
    "train.learning_rate=nan": ["train.learning_rate", "nan"],
    "train.learning_rate=inf": ["train.learning_rate", "inf"],
    "train.precision=fp16": ["train.precision", "fp16", "bf16"],
    "train=5": ["train", "5"],
    "foo=5": ["foo", "Allowed"],
    "seeds=abc": ["seeds"],
    "seeds=[]": ["seeds", "at least one"],
    "seeds=[0,0]": ["seeds", "once"],
    "seeds=[-1]": ["seed", "-1"],
    "seed=7": ["seed", "seeds"],
    "layout.num_experts=0": ["layout.num_experts", "at least 1", "0"],
    "layout.n=5": ["layout.n", "num_layers=2"],
    "model.num_heads=3": ["model.num_heads", "d_model=16", "3"],
    "model.ffn_width=5": ["model.ffn_width=5", "not divisible"],
    "router.top_k=5": ["router.top_k=5", "layout.num_experts=4"],
    "router.top_k=1": ["router.top_k=1", "renormalise"],
    "task.data.path=nosuch": ["task.data.path", "'nosuch'", "does not exist"],
    "task.data.path=bad.parquet": ["task.data.path", "'bad.parquet'", "cannot be read"],
    "task.data.path=empty.txt": ["task.data.path", "'empty.txt'", "no text"],
    "task.data.path=short.txt": ["task.data", "less than one window"],
    "task.data.path=latin.txt": ["task.data.path", "'latin.txt'", "cannot be read"],
    "task.data.path=columns.csv": ["task.data.text_column", "'text'", "Did you mean 'texts'?"],
    "task.sequence_length=100000": ["sequence", "less than one window"],
    "task.data.held_out_domains=[c]": ["task.data.held_out_domains", "'c' is unknown", "Allowed: a, b"],
    "task.data.held_out_domains=[a,b]": ["task.data.held_out_domains", "some of a, b"],
    "task.data.held_out_domains=a": ["task.data.held_out_domains", "a"],
    "train": ["'train'", "key=value"],
    "=5": ["'=5'", "key=value"],
}

VISION_MISTAKES = {
    "task.data.path=nosuch": ["task.data.path", "'nosuch'", "does not exist"],
    "task.data.path=bad.parquet": ["task.data.path", "'bad.parquet'", "cannot be read"],
    "task.data.path=columns.csv": ["task.data.image_column", "'image'", "columns of columns.csv: texts, dom"],
    "task.data.path=empty.txt": ["task.data.path", "'empty.txt'", ".parquet, .csv"],
    "task.data.path=text": ["task.data.path", "'text'", "has no images"],
    "task.data.sources=[fashion,mnis]": ["task.data.sources", "'mnis'", "Did you mean 'mnist'?"],
    "task.data.colour=gray": ["task.data.colour", "gray"],
    "task.data.dataset=text": ["task.data.dataset", "'text' is a local path", "task.data.path=text"],
    "task.data.dataset=nobody/nothing": ["task.data.dataset", "'nobody/nothing'", "task.data.path=..."],
    "task.patch=5": ["task.patch", "divisor", "28", "5"],
    "task.sequence_length=64": ["task.sequence_length", "Allowed"],
    "task.few_shot.shot=[1]": ["task.few_shot", "Did you mean 'shots'?"],
}

CURVE_MISTAKES = {
    "curve ./tiny.yaml": ["--vary", "KEY=v1,v2"],
    "curve ./tiny.yaml --vary layout.capacity_factor_eval": ["--vary", "KEY=v1,v2"],
    "curve ./tiny.yaml --vary router.top_k=1,1": ["--vary", "twice"],
    "curve ./tiny.yaml --vary train.steps=5": ["train.steps", "does not apply to the evaluation"],
    "curve ./tiny.yaml --vary layout.capacity_factor_train=1": [
        "layout.capacity_factor_train",
        "does not apply to the evaluation",
    ],
    "curve ./tiny.yaml --vary layout.num_experts=8": ["layout.num_experts=8", "parameters"],
    "curve ./tiny.yaml --vary layout.capacity_eval=1": ["capacity_eval", "Did you mean 'capacity_factor_eval'?"],
    "curve ./tiny.yaml --vary layout.capacity_factor_eval=x": ["layout.capacity_factor_eval", "x"],
    "curve ./tiny.yaml --vary layout.capacity_factor_eval=1 --vary layout.drop_order=score": [
        "drop_order",
        "noncausal",
    ],
    "curve ./tiny.yaml --vary layout.capacity_factor_eval=1 --plot a_file/x.png": ["a_file/x.png"],
    "curve ./tiny.yaml --vary layout.capacity_factor_eval=1 train.steps=7": ["no cell", "done"],
}

PLUGIN_MISTAKES = {
    "nowhere.py": ["nowhere.py", "no such file"],
    "syntax.py": ["syntax.py", "SyntaxError", "line 1"],
    "raises.py": ["raises.py", "RuntimeError", "boom"],
    "exits.py": ["exits.py", "SystemExit"],
    "imports.py": ["imports.py", "nosuchmodule"],
    "again.py": ["again.py", "router 'switch' is already defined"],
    "a_file": ["a_file", "not a Python file"],
}

OTHER_MISTAKES = {
    "run ./tiny.yaml --nope": ["--nope"],
    "run ./tiny.yaml --jobs -1": ["--jobs"],
    "run ./tiny.yaml --jobs two": ["--jobs", "integer"],
    "run": ["EXPERIMENT"],
    "rum": ["rum", "run"],
    "run nowhere": ["experiment: 'nowhere' is unknown", "Allowed: ", "quickstart"],
    "list routrs": ["routrs", "routers"],
    "show swich": ["'swich'", "Did you mean 'switch'?"],
    "compare swich": ["'swich'", "Did you mean 'switch'?"],
    "compare ./tiny.yaml switch": ["experiments only, or routers only"],
    "compare train.steps=5": ["neither"],
    "compare switch --task langage": ["'langage'", "Did you mean 'language'?"],
    "compare ./tiny.yaml --plot a_file/figure.png": ["a_file/figure.png"],
    "run ./tiny.yaml --results a_file": ["a_file"],
    "run ./tiny.yaml --results a_file/below": ["a_file/below", "cannot be written"],
    "plan ./tiny.yaml --results a_file": ["a_file"],
    "compare ./tiny.yaml --results a_file": ["a_file"],
    "list runs --results a_file": ["a_file"],
    "sync --results nowhere": ["nowhere", "does not exist"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, finished: CommandLine) -> CommandLine:
    """A folder with every broken file, and finished runs that must not change."""
    cli = CommandLine(tmp_path_factory.mktemp("mistakes"))
    cli.write()
    for name, content in FILES.items():
        (cli.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copytree(finished.folder / "results", cli.folder / "results")
    return cli


@pytest.fixture
def refused(work: CommandLine, warm: WarmCommandLine) -> Callable[..., None]:
    """Run a command and check that it is refused in one line with all of `parts`."""

    def check(parts: list[str], *arguments: str) -> None:
        before, present = contents(work.folder / "results"), sorted(os.listdir(work.folder))
        assert_refused(warm(work, *arguments, timeout=60), parts)
        assert contents(work.folder / "results") == before
        assert sorted(os.listdir(work.folder)) == present

    return check


@pytest.mark.parametrize(("name", "parts"), FILE_MISTAKES.items(), ids=FILE_MISTAKES)
def test_a_mistake_in_an_experiment_file(refused: Callable[..., None], name: str, parts: list[str]) -> None:
    refused(parts, "run", f"./{name}.yaml", "--tracker", "none", "train.steps=1", "task.data.path=text")


@pytest.mark.parametrize(("override", "parts"), OVERRIDE_MISTAKES.items(), ids=OVERRIDE_MISTAKES)
def test_a_mistake_in_an_override(refused: Callable[..., None], override: str, parts: list[str]) -> None:
    refused(parts, "run", "./tiny.yaml", override, "--tracker", "none")


@pytest.mark.parametrize(("override", "parts"), VISION_MISTAKES.items(), ids=VISION_MISTAKES)
def test_a_mistake_in_an_override_of_vision(refused: Callable[..., None], override: str, parts: list[str]) -> None:
    refused(parts, "run", "./vision.yaml", override, "--tracker", "none")


@pytest.mark.parametrize(("line", "parts"), CURVE_MISTAKES.items(), ids=CURVE_MISTAKES)
def test_a_mistake_in_a_curve(refused: Callable[..., None], line: str, parts: list[str]) -> None:
    refused(parts, *line.split())


@pytest.mark.parametrize(("plugin", "parts"), PLUGIN_MISTAKES.items(), ids=PLUGIN_MISTAKES)
def test_a_mistake_in_a_plugin(refused: Callable[..., None], plugin: str, parts: list[str]) -> None:
    refused(parts, "run", "./tiny.yaml", "--plugin", plugin, "--tracker", "none")


@pytest.mark.parametrize(("line", "parts"), OTHER_MISTAKES.items(), ids=OTHER_MISTAKES)
def test_a_mistake_in_the_command(refused: Callable[..., None], line: str, parts: list[str]) -> None:
    refused(parts, *line.split())


def test_an_unknown_key_of_the_shipped_experiment(finished: CommandLine, warm: WarmCommandLine) -> None:
    quickstart = "experiments/quickstart.yaml"
    ended = warm(finished, "run", quickstart, "router.top_kk=2", "--results", "nothing_here")
    assert_refused(ended, ["router.top_kk", "Did you mean 'top_k'?"])
    assert not (finished.folder / "nothing_here").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(refused: Callable[..., None], device: str) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(["train.device", "cuda", "cpu"], "run", "./tiny.yaml", f"train.device={device}", "train.steps=1")


def test_a_forbidden_tag_runs_nothing(work: CommandLine) -> None:
    """The YAML tag in tag.yaml, which the tests above have read, has not run its command."""
    assert not (work.folder / "hacked").exists()
