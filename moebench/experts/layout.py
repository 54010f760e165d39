"""Expert layouts: which blocks hold experts, and what each bank of experts is, as a plan of frozen values."""

from abc import ABC, abstractmethod
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
    """Factor on the router's experts per token."""
    groups: int = 1
    """Groups of equal size, side by side, each with its own router."""
    pick_groups: bool = False
    """A router above the groups picks some for each token (two levels); otherwise every token uses every group."""
    unit: int | None = None
    """Width of one unit where the layout itself fixes it; None: the layout's expert_width, or the matched one."""

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
        """Banks of the block, in the order of the forward pass."""
        return tuple(bank for bank in (self.stack, self.attention, self.feed_forward) if bank is not None)


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(LayoutConfig):
    """Options of layouts that define the experts and leave their blocks open."""

    blocks: list[int] | None = None
    """Blocks that hold experts, counted from 0; null: all of them."""

    def block_indices(self, num_layers: int) -> list[int]:
        """Return the blocks with experts, ascending; raise UsageError for one that does not exist."""
        blocks = list(range(num_layers)) if self.blocks is None else self.blocks
        check_blocks(blocks, num_layers)
        return sorted(blocks)


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """Facts about a layout, shown by `list` and `show`."""

    placement: str
    """Description of the blocks that hold experts."""
    paper: str
    experts: str = "feed-forward networks of one shape"
    """Description of a bank."""


class Layout(ABC):
    """Plans which blocks of a model hold experts, and what the experts are."""

    Config: ClassVar[type[LayoutConfig]]

    @staticmethod
    @abstractmethod
    def plan(config: Any, num_layers: int) -> tuple[BlockPlan, ...]:
        """Return one entry for each block from the bottom; raise UsageError for options that do not fit."""


def place_experts(blocks: Iterable[int], num_layers: int, plan: BlockPlan | Experts) -> tuple[BlockPlan, ...]:
    """Return the plan of a model in which `blocks` have experts; a plan of `Experts` is for the feed-forward part."""
    plan = BlockPlan(feed_forward=plan) if isinstance(plan, Experts) else plan
    chosen = set(blocks)
    return tuple(plan if block in chosen else BlockPlan() for block in range(num_layers))


def check_blocks(blocks: Sequence[int], num_layers: int) -> None:
    """Raise UsageError unless there is at least one block, and all exist and differ."""
    if not blocks or len(set(blocks)) != len(blocks) or not all(0 <= block < num_layers for block in blocks):
        raise UsageError(
            f"layout.blocks must name different blocks from 0 to {num_layers - 1} (model.num_layers={num_layers}),"
            f" at least one; got {list(blocks)}"
        )


def check_count(key: str, count: int, num_layers: int) -> None:
    """Raise UsageError unless a number of blocks is at least 1 and at most `num_layers`."""
    fits = 1 <= count <= num_layers
    require(fits, f"layout.{key}", count, f"from 1 to {num_layers} (model.num_layers={num_layers})")


def check_groups(groups: int, num_experts: int) -> None:
    """Raise UsageError unless the number of groups divides the number of experts."""
    if groups < 1 or num_experts % groups:
        allowed = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise UsageError(
            f"layout.groups={groups} does not divide layout.num_experts={num_experts} (allowed: {allowed})"
        )


LAYOUTS: Registry[type[Layout], LayoutFacts] = Registry(
    "layout", "moebench.experts.layouts", item_type=Layout, config_type=LayoutConfig, facts_type=LayoutFacts
)
