"""Checkpoints that a thread writes: the state at the save, errors of the write, runs that are stopped."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, Watched, assert_same_runs, tiny_config, write_text

from moebench.config import cell_id
from moebench.experiment.model_costs import ModelCosts
from moebench.parallel import async_checkpoint
from moebench.parallel.async_checkpoint import AsyncCheckpointIO
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_newest_valid
from moebench.parallel.mesh import SINGLE_PROCESS_MESH
from moebench.schema import CellConfig
from moebench.training.model import prepare_task

ASYNC = {"async_checkpoints": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


class HeldWriter:
    """Holds writes until they are released, and lets them fail."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.error: OSError | None = None


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldWriter]:
    control, write = HeldWriter(), async_checkpoint._Writer.write_and_rotate

    def write_later(writer: Any, *arguments: Any) -> None:
        assert control.may_write.wait(60)
        if control.error is not None:
            raise control.error
        write(writer, *arguments)

    monkeypatch.setattr(async_checkpoint._Writer, "write_and_rotate", write_later)
    yield control
    control.may_write.set()


def state(value: float) -> dict[str, Any]:
    weight, moment = torch.full((3, 2), value), torch.full((3, 2), 2 * value)
    optimizer = {"state.weight.exp_avg": moment, "param_groups.weight.lr": 0.1}
    return {"state_dict": {"weight": weight}, "optimizer_states": [optimizer], "seconds": [value]}


def load(path: Path) -> tuple[float, float, list[float]]:
    content = state(0.0)
    rest = VerifiedCheckpointIO().load_into(content, path)
    return (
        float(content["state_dict"]["weight"][0, 0]),
        float(content["optimizer_states"][0]["state.weight.exp_avg"][0, 0]),
        rest["seconds"],
    )


def test_what_is_written_is_the_state_at_the_save(tmp_path: Path, held: HeldWriter) -> None:
    checkpoint_io, content = AsyncCheckpointIO(SINGLE_PROCESS_MESH), state(1.0)
    checkpoint_io.save_checkpoint(content, checkpoint_path(tmp_path, 1))
    content["state_dict"]["weight"].fill_(5.0)
    content["optimizer_states"][0]["state.weight.exp_avg"].fill_(5.0)
    content["seconds"].append(5.0)
    assert find_newest_valid(tmp_path) == (None, [])
    held.may_write.set()
    checkpoint_io.wait()
    assert load(checkpoint_path(tmp_path, 1)) == (1.0, 2.0, [1.0])


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_an_error_of_a_write_is_raised_once_and_the_checkpoint_before_stays(
    when: str, tmp_path: Path, held: HeldWriter
) -> None:
    checkpoint_io = AsyncCheckpointIO(SINGLE_PROCESS_MESH)
    held.may_write.set()
    checkpoint_io.save_checkpoint(state(1.0), checkpoint_path(tmp_path, 1))
    checkpoint_io.wait()
    held.error = OSError(28, "No space left on device")
    checkpoint_io.save_checkpoint(state(2.0), checkpoint_path(tmp_path, 2))
    save = partial(checkpoint_io.save_checkpoint, state(3.0), checkpoint_path(tmp_path, 3))
    with pytest.raises(OSError, match="No space left"):
        (checkpoint_io.wait if when == "at the end" else save)()
    held.error = None
    checkpoint_io.wait()
    assert find_newest_valid(tmp_path) == (checkpoint_path(tmp_path, 1), [])


def config_of(text: Path, **parallel: Any) -> CellConfig:
    return tiny_config(text, router="loss_free", train={"checkpoint_every": 3}, parallel=parallel)


def test_runs_are_the_same_bit_for_bit(text: Path, tmp_path: Path) -> None:
    waiting, whole, parts = (
        Run(config_of(text), tmp_path / "waiting"),
        *(Run(config_of(text, **ASYNC), tmp_path / name) for name in ("whole", "parts")),
    )
    assert waiting() is not None
    assert whole() is not None
    assert parts(stop_at=7) is None
    assert parts.checkpoint(7)["global_step"] == 7  # on the disk when the run has ended
    assert parts() is not None
    assert_same_runs(waiting, whole)
    assert_same_runs(whole, parts)
    assert cell_id(waiting.config, "") == cell_id(whole.config, "")


def test_a_run_fails_with_the_error_of_its_last_write(text: Path, tmp_path: Path, held: HeldWriter) -> None:
    held.may_write.set()
    run = Run(config_of(text, **ASYNC), tmp_path)
    assert run(stop_at=4) is None
    held.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        run()
    assert find_newest_valid(run.checkpoints) == (checkpoint_path(run.checkpoints, 4), [])


def test_rewinds_go_back_to_a_checkpoint_that_is_written(text: Path, tmp_path: Path) -> None:
    train = {"steps": 24, "spike_window": 8, "spike_threshold": 3.0, "spike_policy": "rewind", "checkpoint_every": 6}
    runs = []
    for name, parallel in (("waiting", {}), ("async", ASYNC)):
        config = tiny_config(text, router="dense", train=train, parallel=parallel)
        task = Watched(prepare_task(config, tmp_path), lambda loss_BP: 50 * loss_BP, at=14)
        runs.append(Run(config, tmp_path / name, task=task))
        result = runs[-1]()
        assert result is not None
        assert [spike["to_step"] for spike in result.spikes] == [12]
    assert_same_runs(*runs)


def test_memory_counts_the_copy(text: Path, tmp_path: Path) -> None:
    costs = ModelCosts(tmp_path)
    waiting, copied = (config_of(text, **parallel) for parallel in ({}, ASYNC))
    size = costs.facts(waiting).size
    params = size.replicated_params + size.expert_params
    assert costs.training_bytes(copied) - costs.training_bytes(waiting) == pytest.approx(3 * 4 * params, abs=8)
