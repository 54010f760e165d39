"""The training batches of a cell: the part of each micro-batch that a process trains on, a function of the step."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.parallel.mesh import Mesh
from moebench.routing.features.feature import sequence_group_size
from moebench.routing.router import required_features
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.objective import LossNormalizer
from moebench.training.prefetch import PrefetchedSteps
from moebench.training.rewinds import NO_REWINDS, Rewinds
from moebench.training.spikes import BatchName

MAX_COUNTED_STEPS = 100_000
"""Steps whose tokens are counted one by one, where they differ."""


class StepBatches:
    """Iterate over the training batches from one step on.

    Batch n is a function of n, so a resumed run continues exactly.

    A step's sequences are split into micro-batches, and each micro-batch into parts, one for each process. On a CPU,
    batches are made in the trainer's thread when it asks: a cell has only the cores that it trains on, and prefetching
    would slow the step. For a GPU a thread makes them ahead, while the trainer's waits for the device.
    """

    def __init__(
        self,
        source: "BatchSource",
        first_step: int,
        on_wait: Callable[[float], None],
    ) -> None:
        """`on_wait`: called with the seconds that the trainer waited for the batches of each step."""
        self.source = source
        self.first_step = first_step
        self.on_wait = on_wait
        self._prefetched: PrefetchedSteps | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of the remaining steps."""
        steps, device = range(self.first_step, self.source.config.train.steps), self.source.mesh.device
        if device.type != "cuda":
            yield from self._iter_timed(map(self.source.make_micro_batches, steps))
            return
        self.close()
        self._prefetched = PrefetchedSteps(self.source.make_micro_batches, steps, device)
        yield from self._iter_timed(iter(self._prefetched))

    def close(self) -> None:
        """End the thread that makes batches, if there is one."""
        if self._prefetched is not None:
            self._prefetched.close()
            self._prefetched = None

    def _iter_timed(self, of_steps: Iterator[Sequence[Batch]]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batches = next(of_steps, None)
            if batches is None:
                return
            self.on_wait(time.perf_counter() - begin)
            yield from batches


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Makes the batches of a cell on one of its processes."""

    config: CellConfig
    task: Task
    mesh: Mesh
    rewinds: Rewinds = NO_REWINDS

    def make_micro_batches(self, step: int) -> list[Batch]:
        """Return this process's part of the micro-batches of update `step`, from 0."""
        train = self.config.train
        size = train.batch_size // train.accumulate
        span = self.mesh.split_sequences(size, sequence_group_size(required_features(self.config.router)))
        number = self.number_batch(step)
        batches = []
        for start in range(0, train.batch_size, size):
            part = slice(start + span.start, start + span.start + span.length)
            batch = self.task.train_batch(train.batch_size, self.config.seed, number, part)
            batches.append(replace(batch, span=span if self.mesh.size > 1 else None))
        counts = [batch.count_BP.sum() for batch in batches if batch.count_BP is not None]
        if not counts:
            return batches
        return [replace(batch, count_in_step=torch.stack(counts).sum()) for batch in batches]

    def number_batch(self, step: int) -> int:
        """Return the number, in the order of the data, of the batch of update `step`, from 0."""
        return self.config.train.skip_batches + self.rewinds.batch_number(step)

    def name_batch(self, step: int) -> BatchName:
        """Return what identifies the batch of update `step`, from 0."""
        number = self.number_batch(step)
        return BatchName.of_task(self.task, self.config.train.batch_size, self.config.seed, number)

    def count_positions(self, step: int) -> int:
        """Return the number of positions in the batch of update `step`, from 0, over all processes, without padding."""
        number = self.number_batch(step)
        return self.task.count_positions(self.config.train.batch_size, self.config.seed, number)


def build_loss_normalizer(batch: Batch, config: CellConfig, mesh: Mesh) -> LossNormalizer:
    """Return what divides the losses of a micro-batch of this process by its step's predictions."""
    num_predictions: int | Tensor = config.train.batch_size * batch.num_predictions
    if batch.count_in_step is not None:
        num_predictions = mesh.world.sum(batch.count_in_step).clamp(min=1)
    return LossNormalizer(num_predictions=num_predictions, num_parts=config.train.accumulate * mesh.size)


def count_train_tokens(config: CellConfig, task: Task, rewinds: Rewinds = NO_REWINDS) -> int:
    """Return the number of tokens that a cell is trained on, without padding and without steps that were undone."""
    train = config.train
    if type(task).count_positions is Task.count_positions:
        return train.steps * train.batch_size * task.tokens_per_sequence
    numbers = map(rewinds.batch_number, range(train.steps)) if rewinds.entries else range(train.steps)
    return sum(_count_positions(config, task, number) for number in numbers)


def estimate_train_tokens(config: CellConfig, task: Task) -> int:
    """Return the number of tokens that a cell will be trained on, for a plan.

    Where the lengths of sequences differ, the steps after the first `MAX_COUNTED_STEPS` count as their mean.
    """
    train = config.train
    if train.steps <= MAX_COUNTED_STEPS or type(task).count_positions is Task.count_positions:
        return count_train_tokens(config, task)
    counted = sum(_count_positions(config, task, step) for step in range(MAX_COUNTED_STEPS))
    return counted * train.steps // MAX_COUNTED_STEPS


def _count_positions(config: CellConfig, task: Task, number: int) -> int:
    """Return the positions of a batch, by its number among those that a cell is trained on."""
    train = config.train
    return task.count_positions(train.batch_size, config.seed, train.skip_batches + number)
