"""Collectives send tensors of the process's device only, as NCCL requires; tested with a simulated device on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.test_resharding import train
from distributed.test_same_training import PLUGINS, TOLERANCES, train_all
from support.mesh_cases import case, matrix
from support.process_group import ALONE, Mesh, Shape
from support.separate_device import DEVICE, HOST, DeviceError, separate_device
from support.task_data import write_data
from support.training_cases import tiny_config, write_text
from support.training_steps import assert_same_training, train_steps, trained_alike

from moebench.registry import load_plugin
from moebench.routing.router import ROUTERS
from moebench.tasks.task import TASKS
from moebench.training.model import prepare_task

MESHES = [Shape(has_group=True), Shape(2, 1), Shape(1, 2), Shape(2, 2)]
CASES = {
    "top_2": case(),  # every second step logs the communication cost
    "experts on both": case(layout={"name": "zero_computation", "num_experts": 8, "match": "none"}),
    "router loss_free": case(router={"name": "loss_free"}),
    "router expert_choice": case(router={"name": "expert_choice"}),
    "router soft_moe": case(router={"name": "soft_moe"}),
    "bf16": case(train={"precision": "bf16", "accumulate": 2}),
    "padded": case(task={"name": "padded"}),
    "reroute": matrix()["reroute"],
}

QUICK = ("reroute", "zero rows", "model options")
"""Of the cases that one process trains; `test_every_task_trains_on_its_device` has an encoder and decoder."""
SIMILAR_TASKS = ("keyword", "language", "masked_language")
"""Their batches are made as those of speech and of the other tasks of text."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "collapsed" not in ROUTERS.names():
        for plugin in PLUGINS:
            load_plugin(str(plugin))
    return write_text(tmp_path_factory.mktemp("text"))


def test_simulated_device_tracks_tensors() -> None:
    with separate_device() as device:
        near, far = torch.zeros(3), torch.zeros(3, device=device)
        assert [x.device for x in (near, near + 1, far.cpu(), far.to("cpu"), near.double(), near.view(3, 1))] == [
            HOST
        ] * 6
        assert [x.device for x in (far, far * 2, near.to(device), far.new_zeros(2), far.double(), far[1:])] == [
            DEVICE
        ] * 6
        assert [torch.ones(2, device=x.device).device for x in (near, far)] == [HOST, DEVICE]
        module = torch.nn.Linear(3, 2)
        assert [module.weight.device, module.to(device).weight.device] == [HOST, DEVICE]
        module(far).sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.device == DEVICE
        leaf = torch.ones(2, device=device, requires_grad=True)
        leaf.cpu().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.device == DEVICE
        for wrong in (lambda: far + near, lambda: torch.equal(far, near), lambda: module(near)):
            with pytest.raises(DeviceError, match="on the host, meets tensors of the device"):
                wrong()
        with pytest.raises(DeviceError, match="generator"):
            torch.rand(3, generator=torch.Generator(), device=device)
    assert torch.zeros(3).to("cpu").device == HOST


def send_from_host(mesh: Mesh) -> list[str]:
    """Return the error of each collective for a tensor on the host; check that it accepts one on the device."""
    on_device, on_host = torch.ones(2, device=mesh.device), torch.ones(2)
    assert mesh.world.sum(on_device).tolist() == [mesh.size] * 2
    assert mesh.world.gather(on_device).shape == (2 * mesh.size,)
    assert mesh.broadcast_object({"rank": mesh.rank}) == {"rank": 0}
    assert mesh.gather_objects(mesh.rank) == list(range(mesh.size))
    mesh.barrier()
    calls: list[Callable[[], Any]] = [lambda: mesh.world.sum(on_host), lambda: mesh.world.gather(on_host)]
    if mesh.process_info.has_group:
        calls += [
            lambda: dist.all_reduce(on_host),
            lambda: dist.broadcast(on_host, 0),
            lambda: dist.all_to_all_single(on_device.clone(), on_host),
            lambda: dist.all_gather_into_tensor(on_device.new_empty(2 * mesh.size), on_host),
        ]
    errors = []
    for call in calls:
        try:
            call()
            errors.append("none")
        except (DeviceError, ValueError) as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("shape", [Shape(), *MESHES[:2]], ids=["alone", "group of one", "two"])
def test_no_collective_accepts_a_tensor_on_the_host(shape: Shape) -> None:
    for errors in replace(shape, is_separate=True).run(send_from_host):
        assert errors[:2] == ["cannot exchange a tensor on cpu: the process group uses cpu:0"] * 2
        assert all("on the host, cannot be sent" in error for error in errors[2:])
        assert len(errors) == (2 if not shape.has_group and shape.size == 1 else 6)


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (runs,) = ALONE.run(train_all, text, CASES, tmp_path_factory.mktemp("alone"))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_sends_tensors_on_the_device_only(
    shape: Shape, text: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    cases = {name: shape.over(overrides) for name, overrides in CASES.items()}
    by_rank = replace(shape, is_separate=True).run(train_all, text, cases, tmp_path)
    for name in cases:
        errors = [runs.get(name, "missing") for runs in by_rank if isinstance(runs.get(name, "missing"), str)]
        assert not errors, "\n".join([name, *errors])
        tolerance = TOLERANCES.get(name, {})
        assert_same_training(trained_alike([runs[name] for runs in by_rank]), alone[name], **tolerance)
        if name == "top_2":
            assert '"parallel/rows/rank_0"' in by_rank[0][name]["journal"]


@pytest.mark.parametrize("shape", [Shape(), Shape(1, 2)], ids=str)
def test_run_without_result_is_evaluated_on_the_device(shape: Shape, text: Path, tmp_path: Path) -> None:
    # Killed between its last checkpoint and its result: by then lightning has moved the module back to the host.
    overrides = shape.over(case(train={"steps": 2}))
    separate = replace(shape, is_separate=True)
    finished = separate.run(train, text, overrides, tmp_path)
    assert separate.run(finish, text, overrides, tmp_path) == finished


def finish(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> dict[str, float]:
    return train(mesh, text, overrides, folder, is_over=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in matrix()]
)
def test_one_process_trains_on_its_device(name: str, text: Path, tmp_path: Path) -> None:
    (run,) = Shape(is_separate=True).run(train_steps, text, matrix()[name], tmp_path)
    assert len(run["steps"]) == 3


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=pytest.mark.slow) if name in SIMILAR_TASKS else name for name in TASKS.names()]
)
def test_every_task_trains_on_its_device(task: str, text: Path, tmp_path: Path) -> None:
    options = {"name": task, **write_data(tmp_path).get(task, {})}
    overrides = case(task=options, train={"steps": 2})
    prepare_task(tiny_config(text, **overrides), tmp_path)  # on the host
    (run,) = Shape(is_separate=True).run(train_steps, text, overrides, tmp_path)
    assert len(run["steps"]) == 2
