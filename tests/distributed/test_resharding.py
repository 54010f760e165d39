"""A checkpoint of any mesh loads in any other bit for bit, and training continues from it."""

from pathlib import Path
from typing import Any

import pytest
from support.mesh_cases import case
from support.process_group import ALONE, Mesh, Shape
from support.training_cases import assert_same_tree, read_checkpoint, tiny_config, write_text

from moebench.parallel.checkpoint import checkpoint_path
from moebench.runs.recorder import RunRecorder
from moebench.training.callback import CellCallback, RunContext
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer
from moebench.training.train import build_trainer, fit, train_cell

TRAIN = {"steps": 6, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 0, "checkpoint_every": 3}
OVERRIDES = case(train=TRAIN, layout={"name": "zero_computation", "num_experts": 8, "match": "none"})
MUON = case(train=TRAIN | {"optimizer": "muon"}, layout={"name": "zero_computation", "num_experts": 8, "match": "none"})
BOTH = pytest.mark.parametrize(
    "overrides", [OVERRIDES, pytest.param(MUON, marks=pytest.mark.slow)], ids=["adamw", "muon"]
)
CHAIN = [Shape(), Shape(1, 2), Shape(2, 2), Shape(1, 4), Shape(2, 1), Shape()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train(
    mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path, stop_at: int = 0, *, is_over: bool = False
) -> dict[str, float]:
    """Train a cell from its newest checkpoint to its end, or until rank 0 is asked to stop.

    `is_over`: the last checkpoint exists, so that no step is left.
    """
    config = tiny_config(text, **overrides)
    task = prepare_task(config, folder)
    done = [0]
    context = RunContext(
        RunRecorder(None),
        folder / "checkpoints",
        report_progress=lambda message: done.append(message["step"]),
        should_stop=lambda: mesh.is_first and done[-1] + 1 == stop_at,
    )
    result = train_cell(config, task, context, cell_id="0", arm="arm", mesh=mesh)
    assert (result is None) == (stop_at > 0)
    assert done[-1] == (0 if is_over else stop_at or config.train.steps)
    return result.metrics if result else {}


def load_and_save(mesh: Mesh, text: Path, overrides: dict[str, Any], source: Path, target: Path, work: Path) -> None:
    """Load a checkpoint of the last step and save it again without a step in between."""
    config = tiny_config(text, **overrides)
    task = prepare_task(config, work)
    module = CellModule(config, build_initialised_model(config, task, mesh), task, mesh)
    timer = StepTimer()
    trainer = build_trainer(config, [CellCallback(RunContext(RunRecorder(None), work), timer)], mesh)
    fit(trainer, module, timer, source, config.train.steps)
    trainer.save_checkpoint(target)


@pytest.mark.slow
@BOTH
def test_every_tensor_survives_a_chain_of_meshes(text: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    ALONE.run(train, text, overrides, tmp_path / "start")
    newest = checkpoint_path(tmp_path / "start" / "checkpoints", 6)
    first = read_checkpoint(newest)
    assert any("bank" in name for name in first["state_dict"])
    state = "momentum_buffer" if overrides is MUON else "exp_avg_sq"
    assert any(state in name and "bank" in name and "w_in" in name for name in first["optimizer"])
    for number, shape in enumerate(CHAIN):
        target = checkpoint_path(tmp_path / str(number), 6)
        shape.run(load_and_save, text, shape.over(overrides), newest, target, tmp_path / "work")
        saved = read_checkpoint(target)
        for part in ("state_dict", "optimizer"):
            assert_same_tree(first[part], saved[part], f"{shape}: {part}")
        newest = target


@pytest.mark.parametrize("then", [pytest.param(Shape(), marks=pytest.mark.slow), Shape(2, 1), Shape(2, 2)], ids=str)
def test_training_continues_on_another_mesh(text: Path, tmp_path: Path, then: Shape) -> None:
    first = Shape(1, 2)
    (uninterrupted,) = ALONE.run(train, text, OVERRIDES, tmp_path / "uninterrupted")
    first.run(train, text, first.over(OVERRIDES), tmp_path / "parts", 3)
    by_rank = then.run(train, text, then.over(OVERRIDES), tmp_path / "parts")
    assert all(metrics == by_rank[0] for metrics in by_rank)
    for name, value in uninterrupted.items():
        assert by_rank[0][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(2, 1), Shape(1, 2), Shape(2, 2)], ids=str)
@BOTH
def test_resumed_run_on_the_same_mesh_is_bit_identical(
    text: Path, tmp_path: Path, shape: Shape, overrides: dict[str, Any]
) -> None:
    overrides = shape.over(overrides)
    uninterrupted = shape.run(train, text, overrides, tmp_path / "uninterrupted")
    shape.run(train, text, overrides, tmp_path / "parts", 4)
    assert shape.run(train, text, overrides, tmp_path / "parts") == uninterrupted
    ends = [read_checkpoint(checkpoint_path(tmp_path / part / "checkpoints", 6)) for part in ("uninterrupted", "parts")]
    for part in ("state_dict", "optimizer"):
        assert_same_tree(ends[0][part], ends[1][part], part)
