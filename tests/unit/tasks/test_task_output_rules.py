"""Plug-in tasks whose modules, loss or metrics break a rule of the contract: one line with the file and the rule."""

from pathlib import Path
from typing import Any

import pytest
from support.broken_plugins import TASK, assert_one_line, write_broken
from support.comparison_runs import make_result
from support.training_cases import TINY, Run

from moebench.config import merge_settings, resolve, to_plain
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.trivial_baselines import BaselineSource, find_baselines
from moebench.plugin_errors import ContractError
from moebench.registry import load_plugin
from moebench.schema import CellConfig
from moebench.training.model import prepare_task

QUALITY = '        return average_by_domain("nats", sums["nats"], sums["weight"], self.domains)\n'
LOSS = "        return loss_T.view_as(batch.target_BP)\n"
LABELS = "    def build_head"

OUTPUTS = {
    "no embedding": (
        "        return TokenEmbedding",
        "        TokenEmbedding",
        ["build_embedding must return a torch.nn.Module", "None"],
    ),
    "a head that fails": ("TokenHead(d_model, 16,", "TokenHead(d_model, size,", ["build_head: NameError", "'size'"]),
    "an embedding of another width": (
        "TokenEmbedding(16, d_model)",
        "TokenEmbedding(16, 5)",
        ["shape [2, 8, 8]", "[2, 8, 5]"],
    ),
    "a loss that is a number": (
        LOSS,
        "        return loss_T.mean()\n",
        ["loss must return one value for each prediction", "got []"],
    ),
    "a loss of other predictions": (
        LOSS,
        LOSS.replace("_BP)", "_BP)[:, 1:]"),
        ["shape [2, 8] as weight_BP, got [2, 7]"],
    ),
    "no loss": (LOSS, "        loss_T.view(-1)\n", ["loss must return a tensor", "NoneType"]),
    "a loss that is nan": (
        LOSS,
        LOSS.replace("_BP)", "_BP) * float('nan')"),
        ["loss must be finite, got 16 of 16 values"],
    ),
    "a loss without a gradient": (LOSS, LOSS.replace("_BP)", "_BP).detach()"), ["loss must have a gradient"]),
    "a loss that fails": ("output.flatten(0, 1)", "output.flatten(0, 5)", ["loss: IndexError", "(line 57)"]),
    "metrics without names": (
        QUALITY,
        "        return 1.0\n",
        ["compute_quality must return metrics by name, got float"],
    ),
    "another metric": (
        QUALITY,
        QUALITY.replace('("nats",', '("bits",'),
        ["must return 'nats', which TaskFacts(metric) names", "bits"],
    ),
    "a metric that is a tensor": (
        QUALITY,
        '        return {"nats": sums["nats"]}\n',
        ["must return numbers, got 'nats': a tensor"],
    ),
    "a metric of a name that trackers refuse": (
        QUALITY,
        '        return {"nats": 1.0, "a%": 1.0}\n',
        ["letters, digits", "'a%'"],
    ),
    "sums that do not exist": (
        QUALITY,
        QUALITY.replace('sums["nats"]', 'sums["loss"]'),
        ["compute_quality: KeyError: 'loss'"],
    ),
    "sums over the batch": (
        LABELS,
        f"    def compute_sums(self, output, batch):\n        return {{'nats': output.sum()}}\n\n{LABELS}",
        ["compute_sums must return tensors whose first dimension is B=2, got 'nats'"],
    ),
}
"""What is replaced in the plug-in, by what, and what the error names; refused before anything is trained."""


def config() -> CellConfig:
    plain = {section: TINY[section] for section in ("model", "layout", "train")}
    return resolve(merge_settings(plain, {"task": {"name": "broken"}, "model": {"tie_embeddings": False}}))


@pytest.mark.parametrize(("old", "new", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_preparation_and_trial(plugin: Any, tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write_broken(plugin, TASK, old, new, "my_task.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        ModelCosts(tmp_path).task(config())
    assert_one_line(caught.value, ["task 'broken'", *words], path)


@pytest.mark.parametrize(("error", "is_refused"), [("KeyError(0)", True), ("ZeroDivisionError", False)])
def test_metrics_may_need_the_whole_evaluation_set(plugin: Any, tmp_path: Path, error: str, is_refused: bool) -> None:
    load_plugin(write_broken(plugin, TASK, QUALITY, f"        raise {error}\n", "my_task.py"))
    if is_refused:
        with pytest.raises(ContractError, match="compute_quality: KeyError"):
            ModelCosts(tmp_path).task(config())
    else:
        ModelCosts(tmp_path).task(config())


QUALITY_OF_ALL = """        count = int(sums["weight"].sum()) // 8
        if count < 3:
            {too_few}
        return {{"nats": float(count)}}
"""


@pytest.mark.parametrize("too_few", ["return {}", "return [][0]", "return 1 / 0"])
def test_metrics_of_more_than_two_sequences(plugin: Any, tmp_path: Path, too_few: str) -> None:
    load_plugin(write_broken(plugin, TASK, QUALITY, QUALITY_OF_ALL.format(too_few=too_few), "my_task.py"))
    assert ModelCosts(tmp_path).task(config()).sequence_length == 8


@pytest.mark.parametrize("dtype", ["byte", "long"])
def test_an_input_may_be_vectors_of_any_type(plugin: Any, tmp_path: Path, dtype: str) -> None:
    """Pixels as bytes, for an embedding that scales them; routers get no token ids."""
    text = TASK.replace("    vocab_size = 16\n", "")
    text = text.replace("        self.token_count_V = torch.ones(16, dtype=torch.int64)\n", "")
    text = text.replace('data="random symbols"', 'data="random symbols", output="classes"')
    text = text.replace("input_BL=token_BM[:, 1:]", f"input_BL=token_BM[:, 1:, None].expand(-1, -1, 4).{dtype}()")
    module = "class Pixels(nn.Linear):\n    def forward(self, x):\n        return super().forward(x / 16)\n\n\n"
    text = text.replace("\n@TASKS", f"\n{module}@TASKS")
    load_plugin(write_broken(plugin, text, "TokenEmbedding(16, d_model)", "Pixels(4, d_model)", "my_task.py"))
    task = ModelCosts(tmp_path).task(config())
    assert task.train_batch(2, 0, 0).token_id_BL is None
    assert Run(config(), tmp_path, task)() is not None


def test_a_loss_that_changes_its_shape_fails_the_cell(plugin: Any, tmp_path: Path) -> None:
    late = "        self.calls = getattr(self, 'calls', 0) + 1\n" + LOSS.replace("_BP)", "_BP)[self.calls // 3 :]")
    path = write_broken(plugin, TASK, LOSS, late, "my_task.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        Run(config(), tmp_path, prepare_task(config(), tmp_path))()
    assert_one_line(caught.value, ["task 'broken'", "loss must return one value for each prediction"], path)


def test_baselines_of_another_type_are_a_note_with_the_file(plugin: Any, tmp_path: Path) -> None:
    method = f"    def compute_baselines(self, split):\n        return 5\n\n{LABELS}"
    path = write_broken(plugin, TASK, LABELS, method, "my_task.py")
    load_plugin(path)
    task = prepare_task(config(), tmp_path)
    digests = {"data_digest": task.digest, "eval_digest": task.eval_digest}
    result = make_result("dense", 0, 2.0, config=to_plain(config()), **digests)
    problem = find_baselines(BaselineSource(result=result, config=config()), tmp_path, "test").problem
    assert_one_line(ContractError(problem), ["task 'broken'", "compute_baselines: TypeError: 'int' object"], path)
