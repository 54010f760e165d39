"""Named sizes: what they set, which keys win, and that the packaged ones cost what they say."""

import json
from pathlib import Path

import pytest
import torch
from support.prepared_text import prepare_folder

from moebench.catalogue.sizes import list_size_rows
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experiment.data_need import DataNeed, _suggest_data, compute_data_need, require_epochs
from moebench.experiment.files import list_sizes
from moebench.experiment.grid import Experiment, expand, expand_routers
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.sizes import read_size
from moebench.tasks.language import Language
from moebench.tasks.text.prepared.manifest import read_manifest
from moebench.training.model import build_model, compute_model_cost
from moebench.training.utilization import BACKWARD_FACTOR

MAX_DEVIATION = 0.25
LADDER = {"demo": 5.8e11, "S0": 1e14, "S1": 1e16, "S2": 2e17, "S3": 2e18}


class Vocabulary(Language):
    """A task on text of which only the sizes are known."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.token_count_V = torch.ones(vocab_size, dtype=torch.int64)
        self.domains, self.num_held_out = ("all",), 0


def experiment(tmp_path: Path, *overrides: str, **keys: object) -> Experiment:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 2000)
    task = {"name": "language", "data": {"path": str(text), "tokenizer": "bytes", "remove_overlap": False}}
    base = {"task": task, "model": {"ffn_width": 96}, "train": {"batch_size": 4, "eval_every": 7}}
    file = tmp_path / "sized.yaml"
    file.write_text(json.dumps({"base": base, "grid": {"router": ["dense", "switch"]}, "seeds": [0]} | keys))
    return expand(file, overrides)


@pytest.mark.parametrize("name", LADDER)
def test_a_packaged_size_spends_its_budget(name: str) -> None:
    size = read_size(name)
    assert size.flops == LADDER[name]
    config = resolve({**size.base, "router": "dense"})
    task = Vocabulary(size.vocab_size, config.task.sequence_length)
    with torch.device("meta"):
        cost = compute_model_cost(build_model(config, task), task.sequence_length)
    tokens = config.train.steps * config.train.batch_size * config.task.sequence_length
    flops = BACKWARD_FACTOR * cost.training_flops * tokens
    assert abs(flops / size.flops - 1) < MAX_DEVIATION
    if name != "demo":
        assert 10 < tokens / cost.active_params < 30


def test_the_packaged_sizes_fit_experts(tmp_path: Path) -> None:
    for name in LADDER:
        expanded = experiment(tmp_path, f"size={name}", "grid.router=[dense, switch, top_k]", "train.max_epochs=inf")
        costs = {cell.arm: ModelCosts(tmp_path).facts(cell.config).cost.flops_per_token for cell in expanded.cells}
        assert max(costs.values()) / min(costs.values()) < 1.02


def test_a_size_of_the_file_is_below_its_keys(tmp_path: Path) -> None:
    expanded = experiment(tmp_path, size="S0")
    config = expanded.cells[0].config
    assert (config.model.d_model, config.train.steps, config.task.sequence_length) == (96, 2180, 128)  # of the size
    assert (config.model.ffn_width, config.train.batch_size, config.train.eval_every) == (96, 4, 7)  # of the file
    assert expanded.name == "sized"
    assert experiment(tmp_path, "size=S0", size="S0").cells == expanded.cells


def test_a_size_of_the_call_is_above_the_keys_of_the_file_and_below_overrides(tmp_path: Path) -> None:
    expanded = experiment(
        tmp_path, "size=S1", "train.batch_size=2", "model.num_layers=3", "train.accumulate=1", size="S0"
    )
    config = expanded.cells[0].config
    assert (config.model.d_model, config.model.ffn_width, config.train.eval_every) == (320, 1280, 526)  # of the size
    assert (config.train.batch_size, config.model.num_layers) == (2, 3)  # of the command line
    assert expanded.name == "sized-S1"  # results of sizes are not mixed
    assert expand_routers(["switch"], "language", ["size=S0"]).name == "compare-switch-S0"


def test_a_size_of_the_call_replaces_model_and_training_of_the_file(tmp_path: Path) -> None:
    task = {"name": "language", "data": {"path": str(tmp_path / "text.txt"), "tokenizer": "bytes"}}
    train = {"optimizer": "muon", "z_loss": 1e-4, "device": "cpu", "max_epochs": 9.0}
    base = {"task": task, "model": {"tie_embeddings": True, "qk_norm": "head"}, "train": train}
    config = experiment(tmp_path, "size=S1", base=base).cells[0].config
    assert (config.train.optimizer, config.train.z_loss) == ("adamw", 0)  # defaults, as in the size
    assert (config.model.tie_embeddings, config.model.qk_norm) == (False, "none")
    assert (config.train.device, config.train.max_epochs) == ("cpu", 9)  # they change no result
    assert config.task.data.tokenizer == "bytes"
    config = experiment(tmp_path, "size=S1", base={"task": task, "train": None}).cells[0].config
    assert config.train.steps == 2630  # a section without keys


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"size: 'S9' is unknown\. Allowed: S0, S1, S2, S3, demo"):
        experiment(tmp_path, "size=S9")


@pytest.mark.parametrize("override", ["task=vision", "task.name=vision", ""])
def test_a_size_of_text_is_refused_for_another_task(tmp_path: Path, override: str) -> None:
    base = {} if override else {"base": {"task": "vision"}}
    with pytest.raises(UsageError, match=r"size: S0 is for the tasks language, .*, and task\.name is 'vision', which"):
        experiment(tmp_path, "size=S0", *filter(None, [override]), **base)


def test_a_size_is_refused_for_arms_of_several_tasks(tmp_path: Path) -> None:
    grid = {"router": ["dense"], "task": ["language", "masked_language"]}
    with pytest.raises(UsageError, match=r"size: S0 sets task\.sequence_length of one task, and the arms have several"):
        experiment(tmp_path, "size=S0", grid=grid)
    with pytest.raises(UsageError, match=r"size: S0 is for the tasks language, .* 'vision'"):
        experiment(tmp_path, "size=S0", grid={"router": ["dense"], "task": ["language", "vision"]})


def test_a_size_sets_the_options_of_the_task_that_an_override_names(tmp_path: Path) -> None:
    expanded = experiment(tmp_path, "size=S0", "task=masked_language")
    assert {cell.config.task.sequence_length for cell in expanded.cells} == {128}  # type: ignore[attr-defined]


def test_a_size_without_tasks_is_for_every_task_that_has_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "any.yaml").write_text("base: {model: {d_model: 48}}")
    (tmp_path / "sizes" / "long.yaml").write_text("base: {task: {sequence_length: 96}}")
    assert experiment(tmp_path, "size=any", "task=vision").cells[0].config.model.d_model == 48
    with pytest.raises(UsageError, match=r"size: long sets task\.sequence_length, which 'vision' lacks"):
        experiment(tmp_path, "size=long", "task=vision")


def test_a_size_in_the_working_folder_takes_the_place_of_a_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "S0.yaml").write_text("about: mine\nbase: {model: {d_model: 32}}")
    assert experiment(tmp_path, "size=S0").cells[0].config.model.d_model == 32
    assert [row["about"] for row in list_size_rows() if row["name"] == "S0"] == ["mine"]
    for text, message in {
        "base: {router: {name: switch}}": "base.router: a size does not set it (allowed: model, train, task)",
        "base: {task: {name: vision}}": "base.task.name: a size does not set it",
        "base: {model: {d_modl: 16}}": "base.model: 'd_modl' is unknown. Did you mean 'd_model'?",
        "base: 3": "base: must be a mapping of sections",
        "flops: -1": "size.flops must be greater than 0 and finite",
        "flop: 1": "flop: the top level has no key 'flop'. Did you mean 'flops'?",
    }.items():
        (tmp_path / "sizes" / "odd.yaml").write_text(text)
        with pytest.raises(UsageError) as caught:
            read_size("odd")
        assert message in str(caught.value)
        assert str(caught.value).startswith("sizes/odd.yaml: ")
    assert list(list_sizes()) == ["demo", "odd", "S0", "S1", "S2", "S3"]


def test_epochs_are_counted_and_limited(tmp_path: Path) -> None:
    # 42,000 bytes of one document: the training split is a part of it, in windows of 128 + 1.
    cells = experiment(tmp_path, "size=S0", "train.steps=50", "train.warmup_steps=1").cells
    costs = ModelCosts(tmp_path)
    need = compute_data_need(cells[0].config, costs.task(cells[0].config))
    assert need is not None
    num_windows = costs.task(cells[0].config).text.train.num_windows  # type: ignore[attr-defined]
    assert need.epochs == pytest.approx(50 * 64 / num_windows)
    assert need.split_bytes == num_windows * 128  # one byte a token
    assert need.read_bytes == 50 * 64 * 128
    assert need.needed_bytes == 50 * 64 * 128 / 4
    with pytest.raises(UsageError) as caught:
        require_epochs(cells, costs)
    text = str(caught.value)
    assert text.startswith("dense: train.steps=50 with train.batch_size=64 are ")
    assert f"(allowed: 4; more data, fewer steps, or train.max_epochs={int(need.epochs) + 1})" in text
    allowed = experiment(tmp_path, "size=S0", "train.steps=50", "train.warmup_steps=1", "train.max_epochs=inf").cells
    require_epochs(allowed, costs)
    assert [cell.id for cell in allowed] == [cell.id for cell in cells]  # a limit changes no result


def test_the_corpus_is_suggested_where_it_is_enough() -> None:
    config = resolve({"task": {"name": "language"}, "router": "dense"})
    for num_read, expected in ((600_000, "more data such as task.data.pack=corpus"), (700_000, "more data")):
        need = DataNeed(num_read=num_read, num_samples=1, sample_bytes=1000.0, max_epochs=4)
        assert _suggest_data(config, need) == expected


def test_epochs_of_a_prepared_folder_are_counted_and_limited(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    rows = [{"text": f"{number} words of a text " * 40} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_folder(tmp_path / "rows.jsonl", folder, tokenizer="bytes", shard_bytes=10_000)
    data = (f"task.data.path={folder}", "task.data.remove_overlap=true")
    given = (*data, "size=S0", "train.steps=50", "train.warmup_steps=1")
    cells, costs = experiment(tmp_path, *given).cells, ModelCosts(tmp_path)
    need = compute_data_need(cells[0].config, costs.task(cells[0].config))
    assert need is not None
    num_bytes = sum(s.num_bytes for shard in read_manifest(folder).shards for s in shard.segments if s.split == "train")
    assert need.split_bytes == pytest.approx(num_bytes, rel=0.02)  # all but the rest of a window, and separators
    assert need.epochs == pytest.approx(50 * 64 * 128 / num_bytes, rel=0.02)
    with pytest.raises(UsageError, match="epochs of the training split"):
        require_epochs(cells, costs)
