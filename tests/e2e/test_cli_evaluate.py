"""`moebench evaluate` from the command line: a run, an experiment, a model of transformers, mistakes."""

import shutil
from pathlib import Path

import pytest
from support.benchmark_tasks import write_tasks
from support.command_line import CommandLine, WarmCommandLine
from support.pretrained_models import write_model
from support.results_folder import Results

pytest.importorskip("lm_eval")
TIMEOUT_S = 200


@pytest.fixture(scope="module")
def copied(finished: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The finished experiment, with a folder of tasks."""
    folder = tmp_path_factory.mktemp("evaluate") / "copy"
    shutil.copytree(finished.folder, folder)
    write_tasks(folder / "tasks")
    return CommandLine(folder)


def test_an_experiment_then_one_of_its_runs(copied: CommandLine, warm: WarmCommandLine) -> None:
    line = ["--include", "tasks", "--tasks", "moebench_cloze,sentences", "--limit", "5"]
    ended = warm(copied, "evaluate", "./tiny.yaml", "seeds=[0]", *line, "--json", timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    tasks = ended.json["tasks"]
    assert [*tasks] == ["moebench_cloze", "sentences"]
    differences = tasks["sentences"]["differences"]
    assert {arm: each["verdict"] for arm, each in differences.items()} == dict.fromkeys(
        ("switch", "top_k"), "too few seeds"
    )
    assert "switch, seed 0: moebench_cloze 0." in ended.err
    files = {file: file.stat().st_size for file in copied.folder.glob("results/runs/*/evaluations/*.jsonl")}
    assert len(files) == 3 * 2
    run = Results(copied.folder / "results").folder("top_k", 0).name
    one = warm(copied, "evaluate", run[:6], *line, "--markdown", timeout=TIMEOUT_S)
    assert one.code == 0, one.err
    value = tasks["sentences"]["arms"]["top_k"]["seeds"]["0"]["metrics"]["bits_per_byte"]["value"]
    assert f"| sentences | bits_per_byte ↓ | {value:.4f} ± " in one.out
    assert {file: file.stat().st_size for file in files} == files
    assert warm(copied, "verify").code == 0


def test_a_model_of_transformers(copied: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "olmoe")
    ended = warm(
        copied, "evaluate", f"hf:{tmp_path / 'model'}", "--include", "tasks", "--tasks", "sentences", timeout=TIMEOUT_S
    )
    assert ended.code == 0, ended.err
    assert "bits_per_byte ↓" in ended.out


MISTAKES = {
    "unknown task": (["./tiny.yaml", "--tasks", "moebench_close"], "Did you mean 'moebench_cloze'?"),
    "no network": (["./tiny.yaml", "--tasks", "arc_easy"], "'arc_easy' cannot be loaded"),
    "no task": (["./tiny.yaml", "--tasks", ","], "--tasks: names no task"),
    "unknown run": (["zzz"], "run: 'zzz' is unknown"),
    "option of a model": (["./tiny.yaml", "--dtype", "float16"], "--dtype: applies to hf:PATH"),
    "option of an experiment": (["hf:model", "train.steps=3"], "KEY=VALUE: applies to an experiment"),
    "missing folder": (["./tiny.yaml", "--include", "nowhere"], "--include nowhere: is no folder"),
    "nothing done": (["./tiny.yaml", "seeds=[77]"], "no cell of 'tiny' is done there"),
}
SLOW = ("unknown task", "no network")
"""Those that read the index of lm-eval's 14,000 tasks."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MISTAKES])
def test_mistakes_are_one_line(name: str, copied: CommandLine, warm: WarmCommandLine) -> None:
    arguments, message = MISTAKES[name]
    ended = warm(copied, "evaluate", *arguments, timeout=TIMEOUT_S)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_damaged_record_is_one_line(copied: CommandLine, warm: WarmCommandLine) -> None:
    line = ["--include", "tasks", "--tasks", "continuations"]
    run = Results(copied.folder / "results").folder("dense", 1).name
    assert warm(copied, "evaluate", run, *line).code == 0
    (file,) = (copied.folder / "results" / "runs" / run / "evaluations").glob("continuations-*.jsonl")
    lines = file.read_text().splitlines()
    for damage, message in {
        lines[2].replace('"truncated": false', '"truncated": true'): "its content does not match its checksum",
        "{}": "it is no object with a checksum",
        "not json": "Expecting value",
    }.items():
        file.write_text("\n".join([*lines[:2], damage, *lines[3:]]) + "\n")
        ended = warm(copied, "evaluate", run, *line)
        assert (ended.code, ended.out) == (2, "")
        assert f"{file.name}: line 3 is damaged ({message}" in ended.err
        assert "delete it to evaluate again" in ended.err
    file.unlink()
    (file.parent / "elsewhere").write_text("")
    file.symlink_to("elsewhere")
    assert "is a symbolic link" in warm(copied, "evaluate", run, *line).err
