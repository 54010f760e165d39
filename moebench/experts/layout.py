"""What an expert layout is: which blocks hold experts, and what each bank of experts is. A plan of frozen values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moebench.components import ExpertShape as ExpertShape
from moebench.components import LayoutConfig as LayoutConfig
from moebench.errors import UsageError, require
from moebench.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A bank of experts behind one router."""

    shapes: tuple[ExpertShape, ...]
    """One for each expert; equal ones side by side are computed together."""
    shared: float = 0.0
    """Width, in units, of a network that every token uses beside its routed experts; 0 for none."""
    residual: bool = False
    """The shared network and the experts are mixed by a softmax (PR-MoE) instead of added."""
    top_k_factor: int = 1
    """The router's experts per token are multiplied by this."""
    groups: int = 1
    """Groups of equal size, side by side, each with a router of its own."""
    pick_groups: bool = False
    """A router above picks groups for each token (two levels); otherwise every group serves every token."""
    unit: int | None = None
    """Width of one unit where the layout itself fixes it; None: the layout's expert_width, or solved."""

    @property
    def can_merge(self) -> bool:
        """Whether the experts' parameters have a sum: networks of one shape."""
        return len(set(self.shapes)) == 1 and self.shapes[0].kind == "ffn"


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One block; None leaves the part dense."""

    feed_forward: Experts | None = None
    attention: Experts | None = None
    """Experts of kind projection, shared_projection or head."""
    stack: Experts | None = None
    """Experts of kind stack: this entry stands for all blocks of the model."""

    @property
    def banks(self) -> tuple[Experts, ...]:
        """The banks of the block, in the order in which a token meets them."""
        return tuple(bank for bank in (self.stack, self.attention, self.feed_forward) if bank is not None)


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(LayoutConfig):
    """Options of layouts that say what experts are, and leave it open where."""

    blocks: list[int] | None = None
    """Blocks that hold experts, counted from 0; null is all of them."""

    def chosen(self, num_layers: int) -> list[int]:
        """Return the blocks with experts, ascending; raise UsageError for one that does not exist."""
        blocks = list(range(num_layers)) if self.blocks is None else self.blocks
        check_blocks(blocks, num_layers)
        return sorted(blocks)


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """What is known about a layout."""

    placement: str
    """Which blocks hold experts, in words."""
    paper: str
    experts: str = "feed-forward networks of one shape"
    """What a bank is, in words."""


class Layout:
    """Says which blocks of a model hold experts, and what they are."""

    Config: ClassVar[type[LayoutConfig]]

    @staticmethod
    def plan(config: Any, num_layers: int) -> tuple[BlockPlan, ...]:
        """Return one entry for each block from the bottom; raise UsageError for options that do not fit."""
        raise NotImplementedError


def place_experts(blocks: Iterable[int], num_layers: int, plan: BlockPlan | Experts) -> tuple[BlockPlan, ...]:
    """Return the plan of a model: the same for each of `blocks`, the others dense; experts alone are feed-forward."""
    plan = BlockPlan(feed_forward=plan) if isinstance(plan, Experts) else plan
    chosen = set(blocks)
    return tuple(plan if block in chosen else BlockPlan() for block in range(num_layers))


def check_blocks(blocks: Sequence[int], num_layers: int) -> None:
    """Raise UsageError unless the blocks exist, each is named once, and there is one."""
    if not blocks or len(set(blocks)) != len(blocks) or not all(0 <= block < num_layers for block in blocks):
        raise UsageError(
            f"layout.blocks must name different blocks from 0 to {num_layers - 1} (model.num_layers={num_layers}),"
            f" at least one; got {list(blocks)}"
        )


def check_count(key: str, count: int, num_layers: int) -> None:
    """Raise UsageError unless a number of blocks is at least 1 and no more than there are."""
    fits = 1 <= count <= num_layers
    require(fits, f"layout.{key}", count, f"from 1 to {num_layers} (model.num_layers={num_layers})")


def check_groups(groups: int, num_experts: int) -> None:
    """Raise UsageError unless the experts can be divided into so many groups."""
    if groups < 1 or num_experts % groups:
        allowed = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise UsageError(
            f"layout.groups={groups} does not divide layout.num_experts={num_experts} (allowed: {allowed})"
        )


LAYOUTS: Registry[type[Layout], LayoutFacts] = Registry("layout", "moebench.experts.layouts")
