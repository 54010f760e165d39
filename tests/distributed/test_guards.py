"""Guards of training on two processes: they decide alike, and name the rank."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.process_group import Mesh, Shape
from support.training_cases import UNREPEATABLE, Watched, tiny_config, write_text

from moebench.registry import load_plugin
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.recorder import RunRecorder
from moebench.training.callback import RunContext
from moebench.training.divergence import NonFiniteError
from moebench.training.model import prepare_task
from moebench.training.train import train_cell

ROUTER = Path(__file__).parents[1] / "support" / "spoiled_router.py"
BATCH = r"batch 3 of seed 0 \(windows (\d+, ){3}\d+\)"
AT = 11
"""The step whose loss is too large, from 1."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def _fail(mesh: Mesh, text: Path, folder: Path, router: dict, expert: int) -> str:
    load_plugin(str(ROUTER))
    config = tiny_config(text, router=router, parallel={"data": 2 // expert, "expert": expert})
    task = prepare_task(config, folder)
    with RunRecorder(RunFolder(folder) if mesh.is_first else None) as recorder:
        context = RunContext(recorder=recorder, checkpoints=folder / "checkpoints")
        try:
            train_cell(config, task, context, cell_id="0" * 12, arm="arm", mesh=mesh)
        except NonFiniteError as error:
            return str(error)
    return "no failure"


@pytest.mark.parametrize(
    ("expert", "kind"),
    [
        (2, "nan"),
        pytest.param(2, "inf", marks=pytest.mark.slow),
        pytest.param(1, "nan", marks=pytest.mark.slow),
        pytest.param(1, "inf", marks=pytest.mark.slow),
    ],
)
def test_rank_is_named(text: Path, tmp_path: Path, expert: int, kind: str) -> None:
    router = {"name": "spoiled", "rank": 1, "call": 0, "kind": kind}
    messages = Shape(2 // expert, expert).run(_fail, text, tmp_path, router, expert)
    assert messages[0] == messages[1]
    place = {
        "nan": r"the activation of backbone\.blocks\.0\.feed_forward\.router \(weight_N\): 16 of 16 values are nan",
        "inf": r"the gradient of the activation of backbone\.blocks\.0\.feed_forward_norm: \d+ of 128 values are .*",
    }[kind]
    assert re.search(rf"at step 4; no update was made; {BATCH}, first in {place} on rank 1$", messages[0]), messages[0]


class KilledError(Exception):
    pass


def _spike(mesh: Mesh, text: Path, folder: Path, policy: str, killed_at: int | None) -> dict[str, Any]:
    """Train with a spike that one rank sees in its part of the batch; die in step `killed_at` and continue."""
    train = {"steps": 24, "spike_window": 8, "checkpoint_every": 4, "spike_policy": policy}
    config = tiny_config(text, train=train, parallel={"expert": 2}, router="loss_free")
    folder = folder / f"{policy} {killed_at}"
    task = Watched(prepare_task(config, folder.parent), (lambda loss: 6 * loss) if mesh.rank == 1 else None, AT)

    def follow(message: dict[str, Any]) -> None:
        if message["step"] == killed_at:
            raise KilledError

    for attempt in range(2):
        with RunRecorder(RunFolder(folder) if mesh.is_first else None) as recorder:
            progress = follow if attempt == 0 else lambda message: None
            context = RunContext(recorder=recorder, checkpoints=folder / "checkpoints", report_progress=progress)
            try:
                result = train_cell(config, task, context, cell_id="0" * 12, arm="arm", mesh=mesh)
                break
            except KilledError:
                mesh.barrier()
    assert result is not None
    points, _ = read_journal(folder / "journal.jsonl")
    journal = [
        {name: value for name, value in point.metrics.items() if not name.startswith((*UNREPEATABLE, "parallel/"))}
        | {"step": point.step}
        for point in points
    ]
    return {"metrics": result.metrics, "spikes": result.spikes, "numbers": task.numbers, "journal": journal}


def _spike_twice(mesh: Mesh, text: Path, folder: Path) -> list[dict[str, Any]]:
    return [_spike(mesh, text, folder, "rewind", killed_at) for killed_at in (None, AT + 2)]


@pytest.mark.slow
def test_two_processes_rewind_alike_and_resume_exactly(text: Path, tmp_path: Path) -> None:
    first, second = Shape(1, 2).run(_spike_twice, text, tmp_path)
    for full, killed in (first, second):
        assert [(spike["step"], spike["to_step"]) for spike in full["spikes"]] == [(AT, 8)]
        assert full["numbers"] == [*range(12), *range(11, 27)]
        for key in ("metrics", "spikes", "journal"):
            assert killed[key] == full[key], key
    assert first[0]["metrics"] == second[0]["metrics"]
    assert first[0]["spikes"] == second[0]["spikes"]


@pytest.mark.slow
def test_two_processes_skip_alike(text: Path, tmp_path: Path) -> None:
    first, second = Shape(1, 2).run(_spike, text, tmp_path, "skip", None)
    assert AT in [spike["step"] for spike in first["spikes"]]
    assert first["spikes"] == second["spikes"]
    assert first["metrics"] == second["metrics"]
