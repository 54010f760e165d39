"""Blocks of training steps: through the real trainer with its journal, and through a loop that does nothing else."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch

from moebench.bench.step.parts import Stopwatch
from moebench.parallel.mesh import Mesh
from moebench.routing.values import LayerRecord
from moebench.runs.folder import RunFolder
from moebench.runs.recorder import RunRecorder
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.callback import CellCallback, RunContext
from moebench.training.evaluation import batch_context
from moebench.training.model import initialised_model
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer
from moebench.training.train import build_trainer, fit

WARM_UP_STEPS = 3
"""Steps at the start of every block that are not timed: the optimizer makes its state in the first."""
NEVER = 10**9


def endless(config: CellConfig) -> CellConfig:
    """Return the cell without evaluations and checkpoints, and without an end: what is left is the step."""
    train = replace(config.train, steps=NEVER, eval_every=NEVER, checkpoint_every=NEVER)
    return replace(config, train=train)


def new_module(config: CellConfig, task: Task, device: torch.device) -> CellModule:
    """Return the cell's module with its initial weights."""
    module = CellModule(config, initialised_model(config, task), task, Mesh(device=device))
    module.to(device)
    return module


class Clock(lightning.Callback):
    """Notes when each step begins, and ends the block after the last."""

    def __init__(self, num_steps: int, now: Callable[[], float]) -> None:
        self.num_steps = num_steps
        self.now = now
        self.begins: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the time: everything between two steps is in it."""
        self.begins.append(self.now())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop one step after the last timed one, whose end is the next one's beginning."""
        trainer.should_stop = trainer.should_stop or len(self.begins) > WARM_UP_STEPS + self.num_steps

    @property
    def seconds_per_step(self) -> float:
        """Wall time of a step, mean over the timed ones."""
        return (self.begins[-1] - self.begins[WARM_UP_STEPS]) / self.num_steps


def trainer_block(module: CellModule, num_steps: int, folder: Path) -> float:
    """Train as a run does, with journal, logging and metrics at the cell's cadence; return seconds per step."""
    clock = Clock(num_steps, Stopwatch(module.device).now)
    with RunRecorder(RunFolder(folder)) as recorder, quiet_lightning():
        timer = StepTimer()
        callback = CellCallback(RunContext(recorder=recorder, checkpoints=folder / "checkpoints"), timer)
        fit(build_trainer(module.config, [callback, clock], module.mesh), module, timer)
    return clock.seconds_per_step


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep lightning's hints out of the terminal: a block is not a run, whose log would take them."""
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
    """The same model, batches, optimizer, schedule and clipping in a bare loop."""

    module: CellModule

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.module.device

    def block(self, num_steps: int, watch: Stopwatch | None = None) -> float:
        """Take the steps of a block; return seconds per step, data included."""
        watch = watch or _NoWatch(self.device)
        optimizers: Any = self.module.configure_optimizers()
        self.module.train()
        with watch.watching(self.module.model):
            for step in range(WARM_UP_STEPS + num_steps):
                if step == WARM_UP_STEPS:
                    watch.reset()
                    start = watch.now()
                self._step(step, optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"], watch)
            seconds = watch.now() - start
        by_part = dict(watch.seconds)
        self._step(WARM_UP_STEPS + num_steps, optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"], watch)
        watch.seconds.clear()
        watch.seconds.update(by_part)  # the last step only keeps the two ways at the same number of updates
        return seconds / num_steps

    def records(self) -> Sequence[LayerRecord]:
        """Return what one forward pass routes, without a change of anything."""
        config = self.module.config
        batch = self.module.task.train_batch(config.train.batch_size, config.seed, 0).to(self.device)
        with torch.no_grad():
            _, records = self.module.model(batch, batch_context(batch, training=True, seed=config.seed))
        return list(records)

    def _step(self, step: int, optimizer: torch.optim.Optimizer, schedule: Any, watch: Stopwatch) -> None:
        module, config = self.module, self.module.config
        with watch.part("data"):
            batch = module.task.train_batch(config.train.batch_size, config.seed, step).to(self.device)
        with (
            watch.part("forward"),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"),
        ):
            loss, records = self._loss(batch, step, watch)
        with watch.part("backward"):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with watch.part("optimizer, clip"):
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.train.clip_norm)
            optimizer.step()
            schedule.step()
        for layer, of_layer in zip(module.layers, zip(*records, strict=True), strict=True):
            layer.after_step(of_layer)

    def _loss(self, batch: Batch, step: int, watch: Stopwatch) -> Any:
        module, config = self.module, self.module.config
        ctx = batch_context(batch, training=True, seed=config.seed, step=step)
        outputs, records = module.run_passes(batch, ctx)
        with watch.part("embedding, head, loss"):
            objective, records = module.compute_loss(batch, outputs, records)
        return objective.total, records


class _NoWatch(Stopwatch):
    """A stopwatch that is only looked at when a block begins and ends: a GPU runs on meanwhile."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        yield


def same_weights(one: CellModule, other: CellModule) -> float:
    """Return the largest difference of two modules' parameters: 0.0 when both ways made the same updates."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    with torch.no_grad():
        return max(float((first.cpu() - second.cpu()).abs().max()) for first, second in pairs)
