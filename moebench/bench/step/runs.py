"""Blocks of training steps: through the real trainer with its journal, and through a plain loop."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from typing_extensions import override

from moebench.bench.step.parts import Stopwatch
from moebench.experts.layer import update_routers
from moebench.parallel.mesh import Mesh
from moebench.routing.values import LayerRecord
from moebench.runs.folder import RunFolder
from moebench.runs.recorder import RunRecorder
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.callback import CellCallback, RunContext
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model
from moebench.training.module import CellModule
from moebench.training.optimizer.clipping import clip_in_update
from moebench.training.step_timer import StepTimer
from moebench.training.train import build_trainer, fit

WARM_UP_STEPS = 3
"""Untimed steps at the start of every block: the first allocates the optimizer's state."""
NEVER = 10**8


def remove_evaluations(config: CellConfig) -> CellConfig:
    """Return the cell without evaluations, checkpoints and last step."""
    train = replace(config.train, steps=NEVER, eval_every=NEVER, checkpoint_every=NEVER)
    return replace(config, train=train)


def build_module(config: CellConfig, task: Task, device: torch.device) -> CellModule:
    """Return the cell's module with its initial weights."""
    module = CellModule(config, build_initialised_model(config, task), task, Mesh(device=device))
    module.to(device)
    return module


class Clock(lightning.Callback):
    """Records the start of the first timed step and the end of the last, and ends the block after one step more.

    In between it does not read the time, for which a GPU would have to finish its work.
    """

    def __init__(self, num_steps: int, now: Callable[[], float]) -> None:
        self.num_steps = num_steps
        self.now = now
        self.num_started = 0
        self.starts: list[float] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.num_started in (WARM_UP_STEPS, WARM_UP_STEPS + self.num_steps):
            self.starts.append(self.now())
        self.num_started += 1

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # One step more than are timed: the end of a step is the start of the next.
        trainer.should_stop = trainer.should_stop or self.num_started > WARM_UP_STEPS + self.num_steps

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time of the timed steps."""
        return (self.starts[1] - self.starts[0]) / self.num_steps


def time_trainer_block(module: CellModule, num_steps: int, folder: Path) -> float:
    """Train with journal, logging and metrics as configured; return the seconds per step."""
    clock = Clock(num_steps, Stopwatch(module.device).now)
    with RunRecorder(RunFolder(folder)) as recorder, silence_lightning():
        timer = StepTimer()
        callback = CellCallback(RunContext(recorder=recorder, checkpoints=folder / "checkpoints"), timer)
        fit(build_trainer(module.config, [callback, clock], module.mesh), module, timer)
    return clock.seconds_per_step


@contextlib.contextmanager
def silence_lightning() -> Iterator[None]:
    """Suppress lightning's hints, which go to the log of a run but to the terminal here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainLoop:
    """Train the same model in a bare loop, with the same batches, optimizer, schedule and clipping."""

    module: CellModule

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.module.device

    def time_block(self, num_steps: int, watch: Stopwatch | None = None) -> float:
        """Take the steps of a block; return the seconds per step, data included."""
        watch = watch or _IdleStopwatch(self.device)
        optimizers: Any = self.module.configure_optimizers()
        self.module.train()
        with watch.time_modules(self.module.model):
            for step in range(WARM_UP_STEPS + num_steps):
                if step == WARM_UP_STEPS:
                    watch.reset()
                    start = watch.now()
                self._step(step, optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"], watch)
            seconds = watch.now() - start
        timed_seconds = dict(watch.seconds)
        self._step(WARM_UP_STEPS + num_steps, optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"], watch)
        watch.seconds.clear()
        watch.seconds.update(timed_seconds)  # the last step only equals the number of updates of the trainer
        return seconds / num_steps

    def route_batch(self) -> Sequence[LayerRecord]:
        """Return the records of one forward pass without side effects."""
        config = self.module.config
        batch = self.module.task.train_batch(config.train.batch_size, config.seed, 0).to(self.device)
        with torch.no_grad():
            _, records = self.module.model(batch, batch_context(batch, training=True, seed=config.seed))
        return list(records)

    def _step(self, step: int, optimizer: torch.optim.Optimizer, schedule: Any, watch: Stopwatch) -> None:
        module, config = self.module, self.module.config
        with watch.time_part("data"):
            batch = module.task.train_batch(config.train.batch_size, config.seed, step).to(self.device)
        with (
            watch.time_part("forward"),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"),
        ):
            loss, records = self._loss(batch, step, watch)
        with watch.time_part("backward"):
            optimizer.zero_grad(set_to_none=True)
            module.backward(loss)
        with watch.time_part("optimizer, clip"):
            if module.checks_later:  # the same kernels as the trainer's, so that both end at the same weights
                clip_in_update(optimizer, module.parameters(), config.train.clip_norm, loss)
            else:
                torch.nn.utils.clip_grad_norm_(module.parameters(), config.train.clip_norm)
            optimizer.step()
            schedule.step()
        update_routers(module.layers, list(zip(*records, strict=True)))

    def _loss(self, batch: Batch, step: int, watch: Stopwatch) -> Any:
        module, config = self.module, self.module.config
        ctx = batch_context(batch, training=True, seed=config.seed, step=step)
        outputs, records = module.run_passes(batch, ctx)
        with watch.time_part("embedding, head, loss"):
            objective, records = module.compute_loss(batch, outputs, records)
        return objective.total, records


class _IdleStopwatch(Stopwatch):
    """A stopwatch that is read only at the start and end of a block, so that a GPU never waits in between."""

    @override
    @contextlib.contextmanager
    def time_part(self, name: str) -> Iterator[None]:
        yield

    @override
    @contextlib.contextmanager
    def time_modules(self, model: Any) -> Iterator[None]:
        yield


def compare_weights(module: CellModule, other: CellModule) -> float:
    """Return the largest difference of two modules' parameters: 0.0 after the same updates."""
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    with torch.no_grad():
        return max(float((first.cpu() - second.cpu()).abs().max()) for first, second in pairs)
