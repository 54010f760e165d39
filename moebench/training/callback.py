"""What happens between the steps of a cell: journal, evaluation, checkpoints, progress, stopping."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch

from moebench.routing.metrics import LoadCount, summarise
from moebench.training.checkpoint import checkpoint_path
from moebench.training.evaluate import Evaluation
from moebench.training.module import CellModule

WARM_UP_STEPS = 3
"""Steps of a process that throughput leaves out: first calls allocate and compile."""


class Recorder(Protocol):
    """Where points go: the journal of the run's folder, and the loads beside it."""

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Record one point."""

    def record_load(self, step: int, layers: dict[str, list[int]]) -> None:
        """Record the load of every expert of each MoE layer."""

    def flush(self) -> None:
        """Return when every point is on the disk."""

    def truncate_after(self, step: int) -> None:
        """Drop the points of steps that will be repeated."""


@dataclass(frozen=True)
class Hooks:
    """How a cell talks to the world while it trains."""

    recorder: Recorder
    progress: Callable[[dict[str, Any]], None] = lambda message: None
    """Called after every step with step, loss and tokens_per_s."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step; True ends the cell at a checkpoint."""


@dataclass
class Meter:
    """Time spent inside steps: from the batch's arrival to the end of the update, evaluations and logs left out."""

    tokens_per_step: int
    seconds: list[float] = field(default_factory=list)
    _start: float = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End a step; a GPU is waited for, since its kernels run behind."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        counted = self.seconds[WARM_UP_STEPS:] or self.seconds
        return statistics.median(counted) if counted else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the median step."""
        return self.tokens_per_step / self.step_s if self.step_s else 0.0


class CellCallback(lightning.Callback):
    """Follows one cell; `stopped` tells whether it was asked to end early."""

    def __init__(self, hooks: Hooks, checkpoints: Path, meter: Meter) -> None:
        self.hooks = hooks
        self.checkpoints = checkpoints
        self.meter = meter
        self.stopped = False
        self.final: Evaluation | None = None
        """The test split, evaluated after the last step; None before."""

    def state_dict(self) -> dict[str, Any]:
        """Keep the seconds of the steps in the checkpoint: a resumed run's speed is that of all its steps."""
        return {"seconds": self.meter.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seconds of the steps before the checkpoint."""
        self.meter.seconds[:] = state_dict["seconds"]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of the step."""
        self.meter.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, then log, evaluate and save as the configuration says."""
        assert isinstance(pl_module, CellModule)
        pl_module.update_routers()
        self.meter.stop(pl_module.device)
        train, step = pl_module.config.train, trainer.global_step
        last = step == train.steps
        assert pl_module.last is not None
        if step % train.log_every == 0 or last or step == 1:
            self._log(pl_module, step)
        if step % train.eval_every == 0 or last:
            self._record(step, pl_module.evaluate("validation"))
        if last:
            self.final = pl_module.evaluate("test")
            self.hooks.recorder.append(step, {f"test/{name}": value for name, value in self.final.metrics.items()})
        self.stopped = not last and self.hooks.should_stop()
        if step % train.checkpoint_every == 0 or last or self.stopped:
            self.hooks.recorder.flush()  # the journal is on disk before a checkpoint claims its steps
            trainer.save_checkpoint(checkpoint_path(self.checkpoints, step))
        trainer.should_stop = trainer.should_stop or self.stopped
        self.hooks.progress(
            {"step": step, "loss": float(pl_module.last.task.detach()), "tokens_per_s": self.meter.tokens_per_s}
        )

    def _log(self, module: CellModule, step: int) -> None:
        assert module.last is not None
        metrics = module.last.to_log() | {
            "train/learning_rate": module.last_rate,
            "train/grad_norm": module.last_grad_norm,
            "train/tokens_per_s": self.meter.tokens_per_step / self.meter.seconds[-1],
        }
        load = summarise([LoadCount.of(record) for record in module.last_records])
        self.hooks.recorder.append(step, metrics | {f"train/{name}": value for name, value in load.items()})

    def _record(self, step: int, evaluation: Evaluation) -> None:
        self.hooks.recorder.append(step, {f"eval/{name}": value for name, value in evaluation.metrics.items()})
        if evaluation.load_by_layer:
            self.hooks.recorder.record_load(step, evaluation.load_by_layer)
