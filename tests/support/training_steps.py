"""A few training steps on a mesh, with everything that must be the same on any other mesh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from support.process_group import Mesh
from support.training_cases import tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from moebench.runs.folder import RunFolder
from moebench.runs.layer_series import iter_layer_series
from moebench.runs.recorder import RunRecorder
from moebench.training.callback import CellCallback, RunContext
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer
from moebench.training.train import build_trainer, fit

TOLERANCE = 1e-5


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return a copy of the full tensor, whether it is sharded or not."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Watcher(lightning.Callback):
    """Records the loss, the gradient norm and the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.grads: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = [(name, p) for name, p in pl_module.model.named_parameters() if p.grad is not None]
        self.grads = {name: gather_tensor(p.grad) for name, p in named}

    def on_train_batch_end(self, trainer: Any, pl_module: CellModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.config.train.accumulate == 0:
            self.steps.append({"loss": pl_module.last_loss, "norm": pl_module.last_grad_norm, "grads": self.grads})


def train_steps(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a tiny cell; return its steps, its final state, its evaluation and its journal."""
    config = tiny_config(text, **overrides)
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task, mesh), task, mesh)
    watcher = Watcher()
    rank_folder = folder / f"rank_{mesh.rank}_of_{mesh.size}"
    rank_folder.mkdir(exist_ok=True)
    with RunRecorder(RunFolder(rank_folder)) as recorder:
        timer = StepTimer()
        callback = CellCallback(RunContext(recorder=recorder, checkpoints=folder / f"checkpoints_{mesh.size}"), timer)
        fit(build_trainer(config, [watcher, callback], mesh), module, timer)
    assert callback.final is not None
    state = module.to(mesh.device).model.state_dict()  # lightning has moved it to the host
    return {
        "steps": watcher.steps,
        "state": {name: gather_tensor(tensor) for name, tensor in state.items()},
        "final": callback.final.metrics,
        "loads": callback.final.load_by_layer,
        "labels": {name: table.layers for name, table in callback.final.labels.items()},
        "layers": list(iter_layer_series(rank_folder / "layers.jsonl")),
        "journal": (rank_folder / "journal.jsonl").read_text(),
    }


def trained_alike(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that the runs of all ranks are the same, and return one of them."""
    first = runs[0]
    for other in runs[1:]:
        for name, tensor in first["state"].items():
            assert torch.equal(other["state"][name], tensor), f"{name} differs between ranks"
        assert [step["norm"] for step in other["steps"]] == [step["norm"] for step in first["steps"]]
        assert other["final"] == first["final"]
    return first


def assert_same_training(
    ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = TOLERANCE, differing: Sequence[str] = ()
) -> None:
    """Compare two trainings: losses, clip norms, every gradient of every step, parameters, state, evaluation.

    `differing`: metrics of the evaluation that depend on the split of the batches.
    """
    assert len(ours["steps"]) == len(theirs["steps"])
    for number, (our, their) in enumerate(zip(ours["steps"], theirs["steps"], strict=True), start=1):
        what = f"step {number}"
        for key in ("loss", "norm"):
            assert abs(our[key] - their[key]) <= tolerance * max(1.0, abs(their[key])), f"{what}: {key}"
        assert our["grads"].keys() == their["grads"].keys(), what
        for name, grad in their["grads"].items():
            close(our["grads"][name], grad, tolerance, f"{what}: gradient of {name}")
    assert ours["state"].keys() == theirs["state"].keys()
    for name, tensor in theirs["state"].items():
        close(
            ours["state"][name], tensor, tolerance, name, least=1.0
        )  # the size of AdamW's steps does not depend on that of the gradient
    assert ours["final"].keys() == theirs["final"].keys()
    for name, value in theirs["final"].items():
        if name in differing:
            continue
        assert abs(ours["final"][name] - value) <= 10 * tolerance * max(1.0, abs(value)), name
    assert ours["loads"] == theirs["loads"]
    for our_point, their_point in zip(ours["layers"], theirs["layers"], strict=True):
        for name, layer in their_point.layers.items():
            our_layer = our_point.layers[name]
            assert (our_layer.load, our_layer.tokens) == (layer.load, layer.tokens), f"{name}, step {our_point.step}"
            for quantity in ("entropy", "logit_max", "logit_std", "experts_per_token"):
                our_value, their_value = getattr(our_layer, quantity), getattr(layer, quantity)
                assert (our_value is None) == (their_value is None), quantity  # soft routing has no logits of experts
                if their_value is not None:
                    assert our_value == pytest.approx(their_value, rel=100 * tolerance, abs=100 * tolerance), quantity
    assert ours["labels"].keys() == theirs["labels"].keys()
    for kind, layers in theirs["labels"].items():
        for layer, table in layers.items():  # integers, except for soft and merging routers
            close(ours["labels"][kind][layer], table, tolerance, f"{kind} of the experts of layer {layer}")


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str, least: float = 1e-3) -> None:
    """Compare relative to the largest absolute value of the tensor, at least `least`."""
    assert ours.shape == theirs.shape, what
    scale = max(float(theirs.double().abs().max()), least) if theirs.numel() else 1.0
    worst = float((ours.double() - theirs.double()).abs().max()) / scale if theirs.numel() else 0.0
    assert worst <= tolerance, f"{what}: {worst:.2e} of its largest value"
