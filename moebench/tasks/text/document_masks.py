"""Which cells can keep the documents of a window apart (`task.data.mask_documents`)."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from moebench.experts.layout import BlockPlan
from moebench.registry import Entry
from moebench.routing.router import Facts, Router
from moebench.schema import CellConfig
from moebench.tasks.task import TaskFacts


class CellComponents(Protocol):
    """What a cell consists of, as `compatibility.Combination` has it."""

    @property
    def config(self) -> CellConfig:
        """The configuration."""

    @property
    def task(self) -> TaskFacts:
        """Facts of the task."""

    @property
    def router(self) -> Entry[type[Router], Facts]:
        """The router."""

    @property
    def blocks(self) -> Sequence[BlockPlan]:
        """The blocks of the layout."""


def refuse_masked_documents(c: CellComponents) -> Iterator[str]:
    """Require components that keep the documents of a window apart, if the option requires it.

    Competition for experts and their slots is allowed: it couples the sequences of a batch too.
    """
    if not getattr(getattr(c.config.task, "data", None), "mask_documents", False):
        return
    key = "task.data.mask_documents: true was given"
    if c.task.is_encoder_decoder:
        yield f"{key}, but the decoder of task '{c.config.task.name}' reads all documents of a window (allowed: false)"
    if c.router.facts.causality.reads_sequence:
        yield (
            f"{key}, but router '{c.config.router.name}' reads other tokens of the sequence, of any document (allowed:"
            " false, or another router)"
        )
    if any(block.stack for block in c.blocks):
        yield (
            f"{key}, but in layout '{c.config.layout.name}' tokens attend inside an expert, to any document (allowed:"
            " false, or a layout of experts inside blocks)"
        )
