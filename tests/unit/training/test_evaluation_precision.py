"""A model is evaluated in the precision of its training; routing and metrics are fp32."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.task_data import write_pictures
from support.training_cases import tiny_config, write_text
from torch import Tensor, nn

from moebench.routing.gate import Gate
from moebench.tasks.images.few_shot import few_shot_accuracy
from moebench.training.evaluation import batch_context, training_precision
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule


def build_random_module(folder: Path, **overrides: Any) -> CellModule:
    """Build a module whose weights are all random, so that its outputs differ between positions."""
    config = tiny_config(write_text(folder), **overrides)
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task), task)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def dtypes_of(module: CellModule) -> Mapping[str, set[torch.dtype]]:
    """Return the output dtypes of gates and of other linear layers in an evaluation."""
    dtypes: dict[str, set[torch.dtype]] = {"gate": set(), "linear": set()}

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            dtypes["gate" if isinstance(layer, Gate) else "linear"].add(output.dtype)

    hooks = [layer.register_forward_hook(record) for layer in module.modules() if isinstance(layer, (Gate, nn.Linear))]
    module.evaluate("test")
    for hook in hooks:
        hook.remove()
    return dtypes


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_model_is_evaluated_in_the_precision_of_training(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = build_random_module(tmp_path, train={"precision": precision})
    assert dtypes_of(module) == {"gate": {torch.float32}, "linear": {dtype}}
    assert not torch.is_autocast_enabled("cpu")


def bits_per_byte(module: CellModule, *, is_bf16: bool) -> float:
    """Compute the metric of the test split by hand: nats in fp32, from logits in fp32 or bf16."""
    nats, num_bytes = 0.0, 0.0
    module.model.eval()
    for batch in module.task.eval_batches("test", module.config.train.batch_size):
        ctx = batch_context(batch, training=False, seed=module.config.seed)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            logits_BLV, _ = module.model(batch, ctx)
        nats_T = nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1).float(), batch.target_BP.flatten(), reduction="none"
        )
        nats += float(nats_T.double().sum())
        num_bytes += float(batch.weight_BP.sum())
    return nats / num_bytes / math.log(2)


def test_metric_is_that_of_the_precision_of_training(tmp_path: Path) -> None:
    module = build_random_module(tmp_path, train={"precision": "bf16"})
    metric = module.evaluate("test").quality["bits_per_byte"]
    assert metric == pytest.approx(bits_per_byte(module, is_bf16=True), rel=1e-7)
    assert metric != pytest.approx(bits_per_byte(module, is_bf16=False), rel=1e-5)
    fp32_module = build_random_module(tmp_path, train={"precision": "fp32"})
    assert fp32_module.evaluate("test").quality["bits_per_byte"] == pytest.approx(
        bits_per_byte(fp32_module, is_bf16=False), rel=1e-7
    )


def test_probe_reads_bf16_features_and_computes_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    data = {"path": str(write_pictures(tmp_path / "pictures")), "size": 8, "held_out_classes": [1, 2]}
    task = {"name": "vision", "patch": 4, "data": data, "few_shot": {"shots": [1], "draws": 1}}
    queries: list[Tensor] = []

    def record(support_CND: Tensor, x_QD: Tensor, label_Q: Tensor, config: Any) -> dict[str, float]:
        assert not torch.is_autocast_enabled("cpu")
        queries.append(x_QD)
        return few_shot_accuracy(support_CND, x_QD, label_Q, config)

    monkeypatch.setattr("moebench.tasks.vision.few_shot_accuracy", record)
    for precision in ("bf16", "fp32"):
        build_random_module(tmp_path, task=task, train={"precision": precision}).evaluate_trained()
    bf16_QD, fp32_QD = queries
    assert bf16_QD.dtype == fp32_QD.dtype == torch.float32
    assert not torch.equal(bf16_QD, fp32_QD)
    assert (bf16_QD - fp32_QD).norm() <= 0.05 * fp32_QD.norm()


def test_autocast_is_disabled_in_fp32() -> None:
    for precision in ("fp32", "bf16"):
        with training_precision(tiny_config(Path("-"), train={"precision": precision}).train, torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
