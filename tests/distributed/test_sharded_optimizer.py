"""With parallel.shard_optimizer training and checkpoints are those of unsharded optimizers, with less memory."""

from pathlib import Path
from typing import Any

import pytest
from distributed.test_resharding import load_and_save, train
from support.mesh_cases import case
from support.process_group import ALONE, Mesh, Shape
from support.training_cases import assert_same_tree, read_checkpoint, tiny_config, write_text
from support.training_steps import assert_same_training, train_steps, trained_alike

from moebench.parallel import parameter_shards
from moebench.parallel.checkpoint import checkpoint_path
from moebench.parallel.sharded_optimizer import ShardedOptimizer, count_state_bytes
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule

# Six experts of a layer do not divide evenly among four processes; zero experts have no parameters.
LAYOUT = {"name": "zero_computation", "num_experts": 12, "match": "none"}
TRAIN = {"weight_decay": 0.1, "accumulate": 2, "steps": 6, "checkpoint_every": 3}
ADAMW = case(layout=LAYOUT, train=TRAIN)
MUON = case(layout=LAYOUT, train=TRAIN | {"optimizer": "muon", "router_learning_rate": 1e-2})
SHARDED = {"shard_optimizer": True}
MESHES = [Shape(2, 1), Shape(2, 2), Shape(4, 1), Shape(1, 2)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train_both_ways(mesh: Mesh, text: Path, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train each case with a complete and with a sharded optimizer."""
    parameter_shards.MAX_GATHERED_ELEMENTS["cpu"] = 200  # several all-gathers, and stacks in pieces
    runs = {}
    for name, overrides in cases.items():
        for is_sharded in (False, True):
            case_folder = folder / f"{name} {is_sharded}"
            case_folder.mkdir(exist_ok=True)
            parallel = overrides["parallel"] | {"shard_optimizer": is_sharded}
            runs[f"{name} {is_sharded}"] = train_steps(mesh, text, overrides | {"parallel": parallel}, case_folder)
    return runs


def mark_slow(shape: Shape) -> Any:
    fast = shape.size == 2 and shape.data == 2
    return pytest.param(shape, id=str(shape), marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("shape", [mark_slow(shape) for shape in MESHES])
def test_training_is_that_of_a_complete_optimizer(shape: Shape, text: Path, tmp_path: Path) -> None:
    cases = {"adamw": shape.over(ADAMW), "muon": shape.over(MUON)}
    by_rank = shape.run(train_both_ways, text, cases, tmp_path)
    for name in cases:
        complete, sharded = (trained_alike([runs[f"{name} {flag}"] for runs in by_rank]) for flag in (False, True))
        assert_same_training(sharded, complete)


def count_bytes(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Return the bytes of the state of a sharded and of a complete optimizer, and check where updates are made."""
    config = tiny_config(text, **overrides)
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task, mesh), task, mesh)
    optimizer: Any = module.configure_optimizers()
    optimizer = optimizer["optimizer"]
    assert isinstance(optimizer, ShardedOptimizer)
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer.state_by_name(names)
    complete = sum(2 * 4 * p.numel() // (mesh.config.expert if hasattr(p, "device_mesh") else 1) for p in names)
    return count_state_bytes(optimizer), complete


@pytest.mark.parametrize("shape", [pytest.param(Shape(2, 2), marks=pytest.mark.slow), Shape(2, 1)], ids=str)
def test_state_is_divided_evenly(shape: Shape, text: Path, tmp_path: Path) -> None:
    layout = {"name": "every_n", "n": 1, "num_experts": 8, "expert_width": 64}
    overrides = case(layout=layout, model={"d_model": 32}, parallel=SHARDED)
    for sharded, complete in shape.run(count_bytes, text, shape.over(overrides), tmp_path):
        # Experts have `data` copies, everything else one on each process; a step counter of 4 bytes for each shard.
        assert sharded <= complete / shape.data + 400


CHAIN = [Shape(2, 1), Shape(2, 2), Shape(4, 1), Shape(2, 1), Shape()]


@pytest.mark.parametrize("overrides", [pytest.param(ADAMW, id="adamw"), pytest.param(MUON, id="muon")])
@pytest.mark.slow
def test_every_tensor_survives_a_chain_of_meshes(text: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    ALONE.run(train, text, overrides, tmp_path / "start")
    newest = checkpoint_path(tmp_path / "start" / "checkpoints", 6)
    first = read_checkpoint(newest)
    for number, shape in enumerate(CHAIN):
        target = checkpoint_path(tmp_path / str(number), 6)
        sharded = Shape(shape.data, shape.expert, SHARDED)
        sharded.run(load_and_save, text, sharded.over(overrides), newest, target, tmp_path / "work")
        saved = read_checkpoint(target)
        for part in ("state_dict", "optimizer", "optimizer_settings"):
            assert_same_tree(first[part], saved[part], f"{shape}: {part}")
        newest = target


def train_in_parts(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Return the metrics of an uninterrupted run and of one that was stopped and resumed."""
    uninterrupted = train(mesh, text, overrides, folder / "uninterrupted")
    train(mesh, text, overrides, folder / "parts", 4)
    return [uninterrupted, train(mesh, text, overrides, folder / "parts")]


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        pytest.param(Shape(2, 1, SHARDED), MUON, id="dp2-muon"),
        pytest.param(Shape(2, 2, SHARDED), ADAMW, id="dp2ep2-adamw", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_bit_identical(shape: Shape, overrides: dict[str, Any], text: Path, tmp_path: Path) -> None:
    for uninterrupted, resumed in shape.run(train_in_parts, text, shape.over(overrides), tmp_path):
        assert resumed == uninterrupted
    ends = [read_checkpoint(checkpoint_path(tmp_path / part / "checkpoints", 6)) for part in ("uninterrupted", "parts")]
    for part in ("state_dict", "optimizer"):
        assert_same_tree(ends[0][part], ends[1][part], part)


@pytest.mark.slow
def test_training_continues_across_meshes(text: Path, tmp_path: Path) -> None:
    overrides = case(layout=LAYOUT, train=TRAIN | {"steps": 8})
    (uninterrupted,) = ALONE.run(train, text, overrides, tmp_path / "uninterrupted")
    ALONE.run(train, text, overrides, tmp_path / "parts", 2)
    for stop_at, shape in ((4, Shape(2, 1, SHARDED)), (6, Shape(2, 2, SHARDED)), (0, Shape(2, 1, SHARDED))):
        by_rank = shape.run(train, text, shape.over(overrides), tmp_path / "parts", stop_at)
    assert all(metrics == by_rank[0] for metrics in by_rank)
    for name, value in uninterrupted.items():
        assert by_rank[0][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
