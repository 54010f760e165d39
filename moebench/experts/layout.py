"""Expert layouts: which blocks hold experts, and what each bank of experts is, as a plan of frozen values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, require
from moebench.experts.capacity import Capacity
from moebench.registry import Registry

Kind = Literal["ffn", "zero", "copy", "constant", "projection", "shared_projection", "head", "stack"]


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """One expert: what it computes, how wide and how deep."""

    kind: Kind = "ffn"
    """ffn, or without a network: zero (y = 0), copy (y = x), constant (a mix of x and a vector). In attention:
    projection (queries, keys and values), shared_projection (queries, and keys that are the values too), head (queries
    and output). stack: all blocks of a model."""
    width: float = 1.0
    """Hidden width in units; matching solves for the unit."""
    depth: int = 1
    """Networks one after another, each added to the stream inside the expert; the cost is linear in it."""


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
    """Groups of equal size, side by side, each with a router of its own."""
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
class LayoutConfig:
    """Options of every layout; each layout's own Config adds its name and its options."""

    name: str
    num_experts: int = 16
    """Experts in each bank."""
    experts_in: Literal["both", "encoder", "decoder"] = "both"
    """Which half of an encoder-decoder model has experts, as the layout places them; the other half is dense."""
    expert_width: int | None = None
    """Hidden width of one expert, of one unit where widths differ; null: `match` decides."""
    expert_activation: Literal["gelu", "swiglu"] | None = None
    """Activation of routed and shared experts; null is the model's."""
    match: Literal["flops", "params", "none"] = "flops"
    """What the width of experts is solved for: FLOPs per token or total parameters; none takes ffn_width."""
    total_params: float = 1.0
    """With match=params: parameters of a block with experts, as a multiple of the dense block's."""
    depth: int = 1
    """Feed-forward networks in one expert, one after another."""
    capacity_factor_train: float | None = None
    """Slots of an expert as a multiple of the even load T·k/E; null is dropless."""
    capacity_factor_eval: float | None = None
    """The same in evaluation; null is dropless, the number to trust."""
    capacity_rule: Literal["megatron", "vmoe", "switch", "deepspeed"] = "megatron"
    """Slots: ceil(T·k·f/E); vmoe: up to a multiple of 4; deepspeed: at least 4; switch: int(T·f/E), at least 4."""
    drop_order: Literal["router", "position", "score", "priority", "random"] = "router"
    """Who keeps a slot: router (its own priority, else position), position, score (largest weight, whichever choice it
    is), priority (first choices before second ones, each by the token's largest weight, as in V-MoE), random."""
    overflow: Literal["drop", "reroute", "pass"] = "drop"
    """Without a slot: drop (nothing), reroute (one of the three next best experts), pass (weight times input)."""
    expert_dropout: float = 0.0
    """Dropout on the hidden activations of experts, in training."""
    recompute: bool = False
    """Compute the activation inside experts again in the backward pass instead of keeping it: less memory."""

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "layout.num_experts", self.num_experts, "at least 1")
        width_fits = self.expert_width is None or self.expert_width >= 1
        require(width_fits, "layout.expert_width", self.expert_width, "at least 1 or null")
        require(self.depth >= 1, "layout.depth", self.depth, "at least 1")
        require(0 < self.total_params < float("inf"), "layout.total_params", self.total_params, "greater than 0")
        for key in ("capacity_factor_train", "capacity_factor_eval"):
            factor = getattr(self, key)
            if factor is not None and not factor > 0:
                raise UsageError(f"layout.{key} must be greater than 0, or null for dropless; got {factor}")
        require(0 <= self.expert_dropout < 1, "layout.expert_dropout", self.expert_dropout, "at least 0 and below 1")

    @property
    def capacity(self) -> Capacity:
        """The capacity rule of the layout's layers."""
        return Capacity(
            train=self.capacity_factor_train,
            eval=self.capacity_factor_eval,
            drop_order=self.drop_order,
            rule=self.capacity_rule,
            overflow=self.overflow,
        )

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """The plain bank: num_experts feed-forward experts of one width."""
        return (ExpertShape(depth=self.depth),) * self.num_experts

    def require_depth_1(self, reason: str) -> None:
        """Raise UsageError when `depth` is set in a layout where it has no meaning."""
        require(self.depth == 1, "layout.depth", self.depth, f"1 in layout '{self.name}' ({reason})")


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(LayoutConfig):
    """Options of layouts that define the experts and leave their blocks open."""

    blocks: list[int] | None = None
    """Blocks that hold experts, counted from 0; null is all of them."""

    def block_indices(self, num_layers: int) -> list[int]:
        """Return the blocks with experts, ascending; raise UsageError for one that does not exist."""
        blocks = list(range(num_layers)) if self.blocks is None else self.blocks
        check_blocks(blocks, num_layers)
        return sorted(blocks)


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """What is known about a layout."""

    placement: str
    """Description of the blocks that hold experts."""
    paper: str
    experts: str = "feed-forward networks of one shape"
    """Description of a bank."""


class Layout:
    """Plans which blocks of a model hold experts, and what the experts are."""

    Config: ClassVar[type[LayoutConfig]]

    @staticmethod
    def plan(config: Any, num_layers: int) -> tuple[BlockPlan, ...]:
        """Return one entry for each block from the bottom; raise UsageError for options that do not fit."""
        raise NotImplementedError


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
    "layout", "moebench.experts.layouts", item_type=Layout, facts_type=LayoutFacts
)
