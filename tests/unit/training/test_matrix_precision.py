"""TF32: where the setting is in effect, and that routers compute exactly under it."""

import contextlib
from pathlib import Path

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text
from torch import Tensor, nn

from moebench.routing.router import Router
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.precision import EXACT, TF32, keep_routing_exact, matrix_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("is_chosen", "device", "setting"), [(True, GPU, TF32), (False, GPU, EXACT), (True, CPU, EXACT)]
)
def test_it_is_in_effect_on_a_gpu_alone_and_restored(is_chosen: bool, device: torch.device, setting: str) -> None:
    train = tiny_config(Path("-"), train={"tf32": is_chosen}).train
    with contextlib.suppress(KeyError), matrix_precision(train, device):
        assert torch.get_float32_matmul_precision() == setting
        raise KeyError
    assert torch.get_float32_matmul_precision() == EXACT


def test_routers_compute_exactly_and_restore_the_setting(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"tf32": True})
    model = build_initialised_model(config, prepare_task(config, tmp_path))
    seen: dict[str, set[str]] = {"router": set(), "other": set()}

    def record(module: nn.Module, inputs: object, output: object) -> None:
        is_router = any(module in set(router.modules()) for router in model.modules() if isinstance(router, Router))
        seen["router" if is_router else "other"].add(torch.get_float32_matmul_precision())

    for module in model.modules():
        if not isinstance(module, Router):
            module.register_forward_hook(record)
    batch = prepare_task(config, tmp_path).train_batch(4, 0, 0)
    with matrix_precision(config.train, GPU):
        model(batch, batch_context(batch, training=True, seed=0))
        assert torch.get_float32_matmul_precision() == TF32
    assert seen == {"router": {EXACT}, "other": {TF32}}


def test_a_router_that_fails_restores_the_setting() -> None:
    class Broken(Router):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x_TD: Tensor, ctx: object) -> Tensor:
            raise RuntimeError("broken")

    router = Broken()
    keep_routing_exact(router)
    train = tiny_config(Path("-"), train={"tf32": True}).train
    with matrix_precision(train, GPU):
        with pytest.raises(RuntimeError, match="broken"):
            router(torch.zeros(1), None)
        assert torch.get_float32_matmul_precision() == TF32


def test_a_cell_on_a_cpu_trains_as_without(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    points = []
    for is_chosen in (False, True):
        run = Run(tiny_config(text, train={"steps": 3, "eval_every": 3, "tf32": is_chosen}), tmp_path / str(is_chosen))
        assert run() is not None
        points.append(run.points())
    assert points[0] == points[1]
