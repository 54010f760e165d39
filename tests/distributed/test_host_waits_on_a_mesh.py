"""What the host waits for in a training step on several processes: what it does in one, and numbers of rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.host_waits import waits_of_steps
from support.mesh_cases import case
from support.process_group import Mesh, Shape
from support.training_cases import tiny_config, write_text

from moebench.runs.folder import RunFolder
from moebench.runs.recorder import RunRecorder
from moebench.schema import CellConfig
from moebench.training.callback import CellCallback, RunContext
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer
from moebench.training.train import build_trainer, fit

NUM_STEPS, NUM_LAYERS = 4, 2
ON_A_CPU = "experts/grouped.py"
"""Products of groups, which read the loads on a CPU alone."""
NUMBERS_OF_ROWS = "parallel/exchange.py"
PART_OF_A_BATCH = "routing/values.py"
"""Assignments of this process, among those of a router that chose for the batch of all processes."""


def count_waits(mesh: Mesh, text: Path, overrides: dict[str, Any], folder: Path) -> Counter[str]:
    """Return file -> waits over four steps, none of which is logged."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("routing.selection", "experts.bank_pass"):  # lists of assignments keep their length on a GPU
            patch.setattr(f"moebench.{module}.can_read_without_waiting", lambda device: False)
        with waits_of_steps(4, 7) as waits:
            _train(mesh, tiny_config(text, **overrides), folder / f"rank_{mesh.rank}")
    files: Counter[str] = Counter()
    for place, number in waits.places.items():
        files[place.split()[-1].partition(":")[0]] += number
    del files[ON_A_CPU]
    return files


def _train(mesh: Mesh, config: CellConfig, folder: Path) -> None:
    folder.mkdir()
    task, timer = prepare_task(config, folder), StepTimer()
    module = CellModule(config, build_initialised_model(config, task, mesh), task, mesh)
    with RunRecorder(RunFolder(folder)) as recorder:
        callback = CellCallback(RunContext(recorder=recorder, checkpoints=folder.parent / "checkpoints"), timer)
        fit(build_trainer(config, [callback], mesh), module, timer)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(2, 1), {"router": {"name": "top_k", "losses": {"load_balance": 0.1, "parameter_penalty": 0.1}}}),
        (Shape(1, 2), {"router": {"name": "top_k", "losses": {"load_balance": 0.1, "parameter_penalty": 0.1}}}),
        pytest.param(Shape(2, 2), {"router": {"name": "expert_choice"}}, marks=pytest.mark.slow),
        pytest.param(Shape(2, 1), {"router": {"name": "remoe"}}, marks=pytest.mark.slow),
        pytest.param(Shape(2, 1), {"parallel": {"shard_optimizer": True}}, marks=pytest.mark.slow),
        pytest.param(
            Shape(1, 2), {"layout": {"capacity_factor_train": 0.7, "overflow": "drop"}}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_step_waits_once_and_once_in_each_layer_for_the_numbers_of_rows(
    shape: Shape, options: dict[str, Any], tmp_path: Path
) -> None:
    train = {"steps": 9, "log_every": 100, "eval_every": 100}
    for files in shape.run(count_waits, write_text(tmp_path), shape.over(case(train=train, **options)), tmp_path):
        in_each_layer = [NUMBERS_OF_ROWS] * (shape.expert > 1) + [PART_OF_A_BATCH] * ("expert_choice" in str(options))
        expected = dict.fromkeys(in_each_layer, NUM_STEPS * NUM_LAYERS)
        others = {file: number for file, number in files.items() if file not in expected}
        assert files == expected | others
        assert sum(others.values()) == NUM_STEPS, others
