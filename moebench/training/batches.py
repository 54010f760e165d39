"""The batches of a run: each process its part of each micro-batch, as a function of the step alone."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moebench.parallel.mesh import Mesh
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.objective import LossNormalizer


class StepBatches:
    """The training batches from one step on: batch n is a function of n, so a resumed run goes on exactly.

    A step's sequences are cut into micro-batches, and each micro-batch into parts, one for each process. They are made
    when the trainer asks, in its own thread: a cell has the cores that it trains on and no other, so what is done ahead
    is done at the expense of the step.
    """

    def __init__(
        self, config: CellConfig, task: Task, first_step: int, mesh: Mesh, waited: Callable[[float], None]
    ) -> None:
        """`waited`: hears the seconds that the batches of each step took, which the trainer waited."""
        self.config = config
        self.task = task
        self.first_step = first_step
        self.mesh = mesh
        self.waited = waited

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of the remaining steps."""
        for step in range(self.first_step, self.config.train.steps):
            begin = time.perf_counter()
            found = self._micro_batches(step)
            self.waited(time.perf_counter() - begin)
            yield from found

    def _micro_batches(self, step: int) -> list[Batch]:
        train = self.config.train
        size = train.batch_size // train.accumulate
        router = self.config.router
        span = self.mesh.split_sequences(size, ROUTERS.get(router.name).item.sequence_group_size(router))
        found = []
        for start in range(0, train.batch_size, size):
            part = slice(start + span.start, start + span.start + span.length)
            batch = self.task.train_batch(train.batch_size, self.config.seed, step, part)
            found.append(replace(batch, span=span if self.mesh.size > 1 else None))
        counts = [batch.count_BP.sum() for batch in found if batch.count_BP is not None]
        if not counts:
            return found
        return [replace(batch, count_in_step=torch.stack(counts).sum()) for batch in found]


def build_loss_normalizer(batch: Batch, config: CellConfig, mesh: Mesh) -> Share:
    """Return which share of its step's predictions a micro-batch of this process is."""
    num_predictions: int | Tensor = config.train.batch_size * batch.num_predictions
    if batch.count_in_step is not None:
        num_predictions = mesh.world.sum(batch.count_in_step).clamp(min=1)
    return LossNormalizer(num_predictions=num_predictions, factor=config.train.accumulate * mesh.size)


def train_tokens(config: CellConfig, task: Task) -> int:
    """Return the tokens that a cell is trained on, padding left out."""
    train = config.train
    return sum(task.count_positions(train.batch_size, config.seed, step) for step in range(train.steps))
