"""The options that every task, layout and router has: the typed sections of a cell that a `name` picks from a registry.

They are plain dataclasses apart from the classes that read them, so that a configuration is read without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moebench.errors import require
from moebench.ranges import BELOW_1, POSITIVE, POSITIVE_FINITE, Range, at_least_1_up_to, check_ranges

ExpertKind = Literal["ffn", "zero", "copy", "constant", "projection", "shared_projection", "head", "stack"]

MAX_EXPERTS = 2**14
"""Experts in one bank."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options that every task has; each task's own Config adds its name and its options."""

    NOT_IN_ID: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that do not change a result, such as the path of the data: left out of the cell's id."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options that every router has; each router's own Config adds its name and its options."""

    LEFT_OUT_AT_DEFAULT: ClassVar[tuple[str, ...]] = ()
    """Keys that are not part of a cell's id at their defaults, so that ids from before they existed stay the same."""

    name: str
    losses: dict[str, float] = field(default_factory=dict)
    """Auxiliary loss -> coefficient; raw losses are logged as balance/NAME, weighted ones as loss/NAME. Each router has
    its own default."""


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """What one expert computes, how wide and how deep it is."""

    kind: ExpertKind = "ffn"
    """ffn: a feed-forward network. Without a network: zero (y = 0), copy (y = x), constant (a mix of x and a vector).
    In attention: projection (queries, keys and values), shared_projection (queries, and keys that are the values too),
    head (queries and output). stack: all blocks of a model."""
    width: float = 1.0
    """Hidden width in units; matching solves for the unit."""
    depth: int = 1
    """Feed-forward networks in sequence, each with its own residual connection; the cost is linear in it."""


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Options that every layout has; each layout's own Config adds its name and its options."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_experts": at_least_1_up_to(MAX_EXPERTS),
        "expert_width": at_least_1_up_to(2**20),
        "depth": at_least_1_up_to(1000),
        **dict.fromkeys(("capacity_factor_train", "capacity_factor_eval"), POSITIVE),
        "total_params": POSITIVE_FINITE,
        "expert_dropout": BELOW_1,
    }

    name: str
    num_experts: int = 16
    """Experts in each bank."""
    experts_in: Literal["both", "encoder", "decoder"] = "both"
    """Halves of an encoder-decoder model that have experts; the other half is dense."""
    expert_width: int | None = None
    """Hidden width of one expert, or of one unit where widths differ; null: solved by `match`."""
    expert_activation: Literal["gelu", "swiglu"] | None = None
    """Activation of routed and shared experts; null: model.activation."""
    match: Literal["flops", "measured_flops", "params", "none"] = "flops"
    """Quantity that expert widths are solved for: FLOPs per token or total parameters; none: experts are as wide as
    model.ffn_width. measured_flops: as flops, and training adjusts routers with a variable number of experts per token
    until the mean of their executed FLOPs is that of the dense model."""
    total_params: float = 1.0
    """With match=params: parameters of a block with experts, as a multiple of those of a dense block."""
    depth: int = 1
    """Feed-forward networks in sequence in one expert."""
    capacity_factor_train: float | None = None
    """Capacity factor f in training: slots per expert as a multiple of the even load T·k/E; null: dropless."""
    capacity_factor_eval: float | None = None
    """Capacity factor in evaluation; null: dropless, which is the result to compare."""
    capacity_rule: Literal["megatron", "vmoe", "switch", "deepspeed"] = "megatron"
    """Slots per expert. megatron: ceil(T·k·f/E); vmoe: rounded up to a multiple of 4; deepspeed: at least 4; switch:
    int(T·f/E), at least 4."""
    drop_order: Literal["router", "position", "score", "priority", "random"] = "router"
    """Order in which assignments get slots. router: the router's own priority, else position; position: earlier tokens
    first; score: larger weights first, whether first or second choices; priority: first choices before second ones,
    each by the largest weight of the token (V-MoE's batch priority routing); random."""
    overflow: Literal["drop", "reroute", "pass"] = "drop"
    """Output of an assignment without a slot: drop (zero), reroute (one of the three next best experts), pass (weight
    times input)."""
    expert_dropout: float = 0.0
    """Dropout probability of the hidden activations of experts, in training."""
    recompute: bool = False
    """Recompute activations inside experts in the backward pass instead of storing them: less memory."""

    def __post_init__(self) -> None:
        check_ranges(self, "layout")

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """Shapes of a uniform bank: num_experts feed-forward experts of width one unit."""
        return (ExpertShape(depth=self.depth),) * self.num_experts

    def require_depth_1(self, reason: str) -> None:
        """Raise UsageError if depth is set in a layout that does not use it."""
        require(self.depth == 1, "layout.depth", self.depth, f"1 in layout '{self.name}' ({reason})")
