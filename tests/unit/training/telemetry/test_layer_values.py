"""The values of layers at logged steps: those of real trainings, and logits by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text
from torch import Tensor

from moebench.ranks import SINGLE_RANK
from moebench.routing.values import LayerRecord, Routing
from moebench.runs.journal import read_journal
from moebench.runs.layer_series import LayerPoint, iter_layer_series
from moebench.training.telemetry.layer_values import summarise_logits


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train(text: Path, folder: Path, **options: Any) -> list[tuple[LayerPoint, dict[str, float]]]:
    """Train a tiny cell; return each point of its layers with the metrics of the step."""
    run = Run(tiny_config(text, allow_noncausal=True, **options), folder)
    run()
    metrics = {p.step: dict(p.metrics) for p in read_journal(folder / "journal.jsonl")[0] if "loss/task" in p.metrics}
    points = list(iter_layer_series(folder / "layers.jsonl"))
    assert [point.step for point in points] == list(metrics)
    return [(point, metrics[point.step]) for point in points]


@pytest.mark.parametrize("router", ["switch", "top_k", "expert_choice", "top_p", "soft_moe", "smear", "act", "hash"])
def test_layers_average_to_the_metrics_of_the_step(text: Path, tmp_path: Path, router: str) -> None:
    options = {"layout": {"capacity_factor_train": 1.0}} if router in ("switch", "top_k") else {}
    pairs = train(text, tmp_path, router=router, train={"steps": 3, "log_every": 2}, **options)
    assert [point.step for point, _ in pairs] == [1, 2, 3]
    for point, metrics in pairs:
        layers = list(point.layers.values())
        expected = {
            "train/load/max_violation": sum(layer.max_violation for layer in layers),
            "train/load/dead_experts": sum(layer.dead_experts for layer in layers),
            "train/load/drop_rate": sum(layer.drop_rate for layer in layers),
            "train/load/unserved": sum(layer.unserved_rate for layer in layers),
            "train/load/experts_per_token": sum(layer.experts_per_token for layer in layers),
        }
        for name, total in expected.items():
            assert total / len(layers) == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name
        has_logits = router in ("switch", "top_k", "expert_choice", "top_p", "smear")
        for layer in layers:
            assert (layer.entropy is not None) == has_logits
            assert not has_logits or 0 <= layer.entropy <= 1


def test_micro_batches_are_added_up(text: Path, tmp_path: Path) -> None:
    one, two = (
        train(text, tmp_path / str(n), router="hash", train={"steps": 1, "accumulate": n})[0][0] for n in (1, 2)
    )
    assert [layer.load for layer in one.layers.values()] == [layer.load for layer in two.layers.values()]
    assert {layer.tokens for layer in two.layers.values()} == {4 * 8}


def test_a_dense_model_has_no_layers(text: Path, tmp_path: Path) -> None:
    Run(tiny_config(text, router="dense", train={"steps": 2}), tmp_path)()
    assert not (tmp_path / "layers.jsonl").exists()


def record_of(logits_TE: Tensor, valid_T: Tensor | None = None) -> LayerRecord:
    expert_TK = torch.zeros(len(logits_TE), 1, dtype=torch.int64)
    routing = Routing.from_top_k(
        expert_TK, torch.ones(expert_TK.shape), num_experts=logits_TE.shape[1], logits_TE=logits_TE
    )
    return LayerRecord(routing=routing, kept=routing, valid_T=valid_T)


def test_entropy_maximum_and_deviation_by_hand() -> None:
    even, certain = torch.zeros(1, 4), torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    padded = record_of(torch.cat([certain, 1e6 * certain]), torch.tensor([True, False]))
    (summary,) = summarise_logits([None], [[record_of(even), padded]], SINGLE_RANK)  # type: ignore[list-item]
    assert summary.entropy == pytest.approx(0.5)  # 1 and 0
    assert summary.largest == 100.0
    assert summary.std == pytest.approx(math.sqrt(100**2 / 8 - (100 / 8) ** 2))


def test_masked_logits_do_not_count() -> None:
    logits_TE = torch.tensor([[1.0, 3.0, -math.inf, -math.inf]])
    (summary,) = summarise_logits([None], [[record_of(logits_TE)]], SINGLE_RANK)  # type: ignore[list-item]
    assert (summary.largest, summary.std) == (3.0, 1.0)
    p = 1 / (1 + math.exp(-2))
    assert summary.entropy == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(4))


def test_no_token_has_no_summary() -> None:
    (summary,) = summarise_logits([None], [[record_of(torch.zeros(0, 4))]], SINGLE_RANK)  # type: ignore[list-item]
    assert (summary.entropy, summary.largest, summary.std) == (None, None, None)
