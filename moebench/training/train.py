"""Training one cell from its configuration to its result, in this process; resumes at the newest good checkpoint."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

from moebench.config import to_plain
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.callback import CellCallback, Hooks, Meter
from moebench.training.checkpoint import VerifiedCheckpointIO, clear_after, drop_all_but, newest_good, step_of
from moebench.training.model import initialised_model, marks_of, model_cost
from moebench.training.module import CellModule
from moebench.training.result import RunResult


class StepBatches(IterableDataset[Batch]):
    """The training batches from one step on: batch n is a function of n, so a resumed run goes on exactly."""

    def __init__(self, config: CellConfig, task: Task, first_step: int) -> None:
        self.config = config
        self.task = task
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the remaining steps."""
        train = self.config.train
        for step in range(self.first_step, train.steps):
            yield self.task.train_batch(train.batch_size, self.config.seed, step)


def train_cell(
    config: CellConfig, task: Task, checkpoints: Path, hooks: Hooks, *, cell_id: str, arm: str
) -> RunResult | None:
    """Train (or go on training) one cell and evaluate it on the test split.

    Returns None when it was asked to stop; what was done lies in the checkpoint. Raises NonFiniteError before an
    update with a loss or gradient that is not a number.
    """
    started = time.perf_counter()
    resume, damaged = newest_good(checkpoints)
    for line in damaged:
        print(line, flush=True)
    first_step = step_of(resume) if resume else 0
    clear_after(first_step, checkpoints)
    hooks.recorder.truncate_after(first_step)
    model = initialised_model(config, task)
    meter = Meter(tokens_per_step=config.train.batch_size * task.sequence_length)
    module = CellModule(config, model, task)
    callback = CellCallback(hooks, checkpoints, meter)
    fit(make_trainer(config, [callback]), module, resume, first_step)
    if callback.stopped:
        return None
    # Killed between the last checkpoint and the result: the journal has the evaluation, the result does not.
    final = callback.final or module.evaluate("test")
    drop_all_but(1, checkpoints)  # there is nothing left to fall back from
    cost = asdict(model_cost(model, task.sequence_length))
    cost["train_tokens"] = config.train.steps * meter.tokens_per_step
    return RunResult(
        id=cell_id,
        arm=arm,
        seed=config.seed,
        status="done",
        error=None,
        step=config.train.steps,
        metrics=final.metrics,
        cost={name: float(value) for name, value in cost.items()},
        throughput={
            "tokens_per_s": meter.tokens_per_s,
            "step_s": meter.step_s,
            "train_s": sum(meter.seconds),
            "total_s": time.perf_counter() - started,
        },
        data_digest=task.digest,
        eval_digest=task.eval_digest,
        marks=marks_of(config),
        config=to_plain(config),
    )


def make_trainer(config: CellConfig, callbacks: Sequence[lightning.Callback]) -> lightning.Trainer:
    """Return the trainer of a cell; all that happens between steps is in the callbacks."""
    return lightning.Trainer(
        accelerator=_accelerator(config.train.device),
        devices=1,
        precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
        max_steps=config.train.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        plugins=[VerifiedCheckpointIO()],
    )


def fit(trainer: lightning.Trainer, module: CellModule, resume: Path | None = None, first_step: int = 0) -> None:
    """Train a cell's module from a step on, with the batches of its task."""
    batches = DataLoader(StepBatches(module.config, module.task, first_step), batch_size=None)
    with warnings.catch_warnings():
        # The loader is cheap and its order is a function of the step: workers would only add processes.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The batches begin at the resumed step by themselves: nothing is replayed, the state needs no loader.
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
        trainer.fit(module, batches, ckpt_path=resume)


def _accelerator(device: str) -> Any:
    return "gpu" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
