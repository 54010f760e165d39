"""How much of its training split a cell reads, and a limit on how often: more epochs measure memorisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.runs.cell import Cell
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.tasks.text.sources import TextDataConfig

CORPUS_BYTES = 160e6
"""Bytes of training text of `task.data.pack=corpus`."""


@runtime_checkable
class FiniteTask(Protocol):
    """A task whose training split is a number of samples: one batch has `train.batch_size` of them."""

    def count_train_samples(self) -> int:
        """Return the number of samples of the training split."""


@runtime_checkable
class TextualTask(Protocol):
    """A finite task on text."""

    max_epochs: float
    """Most epochs, where `train.max_epochs` is null."""

    def estimate_sample_bytes(self) -> float:
        """Return the UTF-8 bytes of text that a sample predicts."""


@dataclass(frozen=True, kw_only=True)
class DataNeed:
    """The samples that a cell trains on, and those that there are."""

    num_read: int
    num_samples: int
    sample_bytes: float | None
    """UTF-8 bytes of text of a sample; None where the data are no text."""
    max_epochs: float

    @property
    def epochs(self) -> float:
        """How often the training split is read."""
        return self.num_read / self.num_samples

    @property
    def read_bytes(self) -> float | None:
        """Bytes of text that are read in training, repetitions included."""
        return None if self.sample_bytes is None else self.num_read * self.sample_bytes

    @property
    def needed_bytes(self) -> float | None:
        """Bytes of text that a training split needs so that it is not read too often."""
        return None if self.read_bytes is None else self.read_bytes / self.max_epochs

    @property
    def split_bytes(self) -> float | None:
        """Bytes of text of the training split."""
        return None if self.sample_bytes is None else self.num_samples * self.sample_bytes


def compute_data_need(config: CellConfig, task: Task) -> DataNeed | None:
    """Return what a cell reads of its training split; None for generated data."""
    if not isinstance(task, FiniteTask):
        return None
    sample_bytes, limit = None, math.inf
    if isinstance(task, TextualTask):
        sample_bytes, limit = task.estimate_sample_bytes(), task.max_epochs
    return DataNeed(
        num_read=config.train.steps * config.train.batch_size,
        num_samples=task.count_train_samples(),
        sample_bytes=sample_bytes,
        max_epochs=limit if config.train.max_epochs is None else config.train.max_epochs,
    )


def require_epochs(cells: Sequence[Cell], costs: ModelCosts) -> None:
    """Raise UsageError for a cell that would read its training split more often than allowed."""
    for cell in {cell.arm: cell for cell in cells}.values():
        need = compute_data_need(cell.config, costs.task(cell.config))
        if need is not None and need.epochs > need.max_epochs:
            train = cell.config.train
            raise UsageError(
                f"{cell.arm}: train.steps={train.steps} with train.batch_size={train.batch_size}"
                f" are {need.epochs:.1f} epochs of the training split (allowed: {need.max_epochs:g};"
                f" {_suggest_data(cell.config, need)}, fewer steps, or train.max_epochs={math.ceil(need.epochs)})"
            )


def _suggest_data(config: CellConfig, need: DataNeed) -> str:
    """Return where more data are: the larger embedded text, if it is enough, for a task that reads the smaller one."""
    data = getattr(config.task, "data", None)
    is_small_text = isinstance(data, TextDataConfig) and (data.pack, data.path, data.dataset) == ("domains", None, None)
    is_enough = is_small_text and (need.needed_bytes or 0) <= CORPUS_BYTES
    return "more data such as task.data.pack=corpus" if is_enough else "more data"
