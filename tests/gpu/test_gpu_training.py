"""Training on a GPU: every task, a run that is resumed, the command line, and the collectives of NCCL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.test_tasks import NUM_EXPERTS, one_of_each_family
from support.broken_plugins import ROUTER, write_broken
from support.command_line import CommandLine
from support.task_data import write_data
from support.training_cases import TINY, Run, assert_same_runs, read_checkpoint, tiny_config, write_text
from torch.distributed import TCPStore

from moebench.compatibility import check_cell
from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.experts.layout import LAYOUTS
from moebench.parallel.collectives import AsyncAllToAll
from moebench.parallel.exchange import ExpertExchange
from moebench.parallel.mesh import Mesh, open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.plugin_errors import ContractError
from moebench.registry import load_plugin
from moebench.runs.folder import RunFolder
from moebench.runs.recorder import RunRecorder
from moebench.schema import ParallelConfig
from moebench.tasks.task import TASKS
from moebench.training.callback import RunContext
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.train import select_device, train_cell

pytestmark = [
    pytest.mark.gpu,
    # torch 2.13 has new names for two things that 2.11 has under the old ones alone.
    pytest.mark.filterwarnings("ignore:.*(all_gather_into_tensor|broadcast_buffers).* is deprecated:FutureWarning"),
    # On a CPU alone: the norm of bf16 rows by fp32 weights has no fused kernel.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return write_data(tmp_path_factory.mktemp("data"))


def short(device: torch.device, **changes: Any) -> dict[str, Any]:
    """Return a cell of four steps in bf16."""
    train = TINY["train"] | {"steps": 4, "device": device.type, "precision": "bf16"}
    layout = {"num_experts": NUM_EXPERTS, "match": "none"}
    return merge_settings({"model": TINY["model"] | {"ffn_width": 128}, "train": train, "layout": layout}, changes)


def finishes(raw: dict[str, Any], folder: Path) -> None:
    """Train the cell, or see it refused."""
    try:
        config = resolve(raw)
        check_cell(config)
        result = Run(config, folder)()
    except UsageError as error:
        pytest.skip(str(error))
    assert result is not None
    assert result.metrics[TASKS.get(config.task.name).facts.metric] < float("inf")


@pytest.mark.parametrize("router", one_of_each_family())
@pytest.mark.parametrize("task", TASKS.names())
def test_every_task_trains(task: str, router: str, data: Any, device: torch.device, tmp_path: Path) -> None:
    finishes(short(device, task={"name": task, **data[task]}, router={"name": router}), tmp_path)


@pytest.mark.parametrize("router", ["switch", "expert_choice", "soft_moe"])
@pytest.mark.parametrize("layout", LAYOUTS.names())
def test_every_layout_trains(layout: str, router: str, data: Any, device: torch.device, tmp_path: Path) -> None:
    changes = {"task": {"name": "vision", **data["vision"]}, "layout": {"name": layout}}
    finishes(short(device, router={"name": router}, **changes), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_bit_for_bit(precision: str, device: torch.device, tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"device": device.type, "precision": precision})
    complete, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    assert complete() is not None
    assert parts(stop_at=5) is None
    assert parts() is not None
    assert_same_runs(complete, parts)


def test_a_bf16_run_is_evaluated_in_bf16(device: torch.device, tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"device": device.type, "precision": "bf16"})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task, Mesh(device=select_device(config.train)))
    module.to(module.mesh.device)
    seen: set[torch.dtype] = set()
    module.model.head.register_forward_hook(lambda head, given, output: seen.add(output.dtype))
    assert module.evaluate("test").quality["bits_per_byte"] > 0
    assert seen == {torch.bfloat16}


def test_the_command_line_trains_and_compares(cli: CommandLine, device: torch.device) -> None:
    cli.write(grid={"router": ["dense", "switch", "top_k"]})
    ended = cli("run", "./tiny.yaml", f"train.device={device.type}", "train.precision=bf16", "--jobs", "3", timeout=280)
    assert ended.code == 0, ended.err
    compared = cli("compare", "./tiny.yaml", f"train.device={device.type}", "train.precision=bf16", "--json")
    assert compared.code == 0, compared.err
    assert set(compared.json["arms"]) == {"dense", "switch", "top_k"}


@pytest.fixture
def mesh(device: torch.device) -> Iterator[Mesh]:
    """A group of one process, with the backend that many would use."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config = ParallelConfig(timeout_s=60.0)
    process_info = ProcessInfo(store_port=store.port, namespace="test")
    with open_mesh(config, process_info, torch.device("cuda", 0) if device.type == "cuda" else device) as mesh:
        assert torch.distributed.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        yield mesh


def test_collectives_of_one_process(mesh: Mesh) -> None:
    device = mesh.device
    value = torch.tensor([1.0, 10.0], device=device, requires_grad=True)
    summed = mesh.world.sum(value)
    (summed * torch.tensor([1.0, 2.0], device=device)).sum().backward()
    assert summed.tolist() == [1.0, 10.0]
    assert value.grad is not None
    assert value.grad.tolist() == [1.0, 2.0]
    assert mesh.world.gather(torch.ones(2, 3, device=device)).shape == (2, 3)
    assert mesh.broadcast_object({"said": 1}) == {"said": 1}
    mesh.barrier()
    for dtype in (torch.float32, torch.bfloat16):
        x_RI = torch.randn(5, 3, device=device).to(dtype).requires_grad_()
        came_RI = AsyncAllToAll([5], [5], torch.distributed.group.WORLD, mesh.traffic)(x_RI)
        assert torch.equal(came_RI, x_RI)
        (came_RI * 2).sum().backward()
        assert torch.equal(x_RI.grad, torch.full_like(x_RI, 2))


@pytest.mark.parametrize("overlap", [True, False])
def test_the_exchange_brings_rows_to_experts_and_back(overlap: bool, mesh: Mesh) -> None:
    exchange = ExpertExchange(torch.distributed.group.WORLD, mesh.traffic, overlap=overlap)
    factor_E = torch.tensor([1.0, 2.0, 3.0], device=mesh.device)
    done: list[bool] = []
    y_RO = exchange(
        lambda x_RI, load_E: x_RI * factor_E.repeat_interleave(load_E)[:, None],
        torch.ones(6, 2, device=mesh.device),
        torch.tensor([2, 0, 3], device=mesh.device),
        lambda: done.append(True),
    )
    assert y_RO[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 0.0]
    assert done == [True]


def test_a_run_over_a_group_of_one_is_the_run_alone(mesh: Mesh, device: torch.device, tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), train={"device": device.type}, router={"name": "switch"})
    task = prepare_task(config, tmp_path)
    ended = []
    for name, over in (("group", mesh), ("alone", Mesh(device=mesh.device))):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        with RunRecorder(folder) as recorder:
            context = RunContext(recorder=recorder, checkpoints=folder.checkpoints)
            result = train_cell(config, task, context, cell_id="0" * 12, arm="arm", mesh=over)
        assert result is not None
        (checkpoint,) = folder.checkpoints.glob("step_*.ckpt")
        ended.append((result.metrics, read_checkpoint(checkpoint)["state_dict"]))
        costs = "parallel/rows/rank_0" in folder.journal.read_text()
        assert costs == (name == "group")  # they are gathered by NCCL too, if only of one
    assert ended[0][0] == pytest.approx(ended[1][0], rel=1e-5)
    for ours, theirs in zip(ended[0][1].values(), ended[1][1].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_draws_of_a_plugin_are_noticed_and_nothing_else(
    plugin: Any, device: torch.device, tmp_path: Path, precision: str
) -> None:
    text, logits = write_text(tmp_path), "        logits_TE = self.gate(x_TD)\n"
    train = {"steps": 4, "device": device.type, "precision": precision}
    config = {"router": "broken", "train": train, "model": {"attention_dropout": 0.1, "residual_dropout": 0.1}}
    load_plugin(write_broken(plugin, ROUTER, logits, f"{logits}        ctx.uniform(len(x_TD), 4)\n", "allowed.py"))
    assert Run(tiny_config(text, **config), tmp_path / "allowed")() is not None
    noise = f"{logits}        logits_TE = logits_TE + torch.rand_like(logits_TE)\n"
    refused = ROUTER.replace('"broken"', '"refused"')
    load_plugin(write_broken(plugin, refused, logits, noise, "refused.py"))
    generator = "torch" if device.type == "cpu" else "torch.cuda"
    with pytest.raises(ContractError, match=rf"forward draws from the global random generator of {generator};"):
        Run(tiny_config(text, **config | {"router": "refused"}), tmp_path / "refused")()
