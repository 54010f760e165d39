"""What an expert layout is: which blocks hold experts, and what each bank of experts is."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, require
from moebench.experts.capacity import Capacity
from moebench.registry import Registry

MATCH_TOLERANCE = 0.02
"""Arms whose active FLOPs differ by more than this are not matched."""


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Options that every layout has; each layout's own Config adds its name and its options."""

    name: str
    num_experts: int = 16
    """Experts in each bank."""
    expert_width: int | None = None
    """Hidden width of one expert; null matches the arms: router and active experts cost what ffn_width costs."""
    capacity_factor_train: float | None = None
    """Slots of an expert as a multiple of the even load T·k/E; null is dropless."""
    capacity_factor_eval: float | None = None
    """The same in evaluation; null is dropless, the number to trust."""
    capacity_rule: Literal["megatron", "vmoe", "switch", "deepspeed"] = "megatron"
    """Slots: ceil(T·k·f/E); vmoe: up to a multiple of 4; deepspeed: at least 4; switch: int(T·f/E), at least 4."""
    drop_order: Literal["router", "position", "score", "random"] = "router"
    """Who keeps a slot: router (its own priority, else position), position, score (largest weight), random."""
    overflow: Literal["drop", "reroute", "pass"] = "drop"
    """Without a slot: drop (nothing), reroute (the next best expert with a free slot), pass (weight times input)."""
    expert_dropout: float = 0.0
    """Dropout on the hidden activations of experts, in training."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.num_experts < 1:
            raise UsageError(f"layout.num_experts must be at least 1, got {self.num_experts}")
        if self.expert_width is not None and self.expert_width < 1:
            raise UsageError(f"layout.expert_width must be at least 1 or null, got {self.expert_width}")
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


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """What is known about a layout."""

    placement: str
    """Which blocks hold experts, in words."""
    paper: str


class Layout:
    """Says which blocks of a model hold experts."""

    Config: ClassVar[type[LayoutConfig]]

    @staticmethod
    def places(config: Any, num_layers: int) -> tuple[bool, ...]:
        """Return for each block, from the bottom, whether it holds experts."""
        raise NotImplementedError


def matched_width(ffn_width: int, experts_per_token: int, router_in_widths: float) -> int:
    """Return the hidden width of one expert that makes router and active experts cost what the dense network costs.

    `router_in_widths`: FLOPs of the router for one token, as a number of hidden units. Rounded to a multiple of 4
    (rows of 16 bytes, which grouped kernels want) where that stays within 2 % of the dense cost, else to a unit.
    Raises UsageError when no width does.
    """
    width = _nearest_width(ffn_width, experts_per_token, router_in_widths)
    if width is not None:
        return width
    wider = itertools.count(ffn_width + 1)
    fits = next(other for other in wider if _nearest_width(other, experts_per_token, router_in_widths))
    raise UsageError(
        f"model.ffn_width={ffn_width} is not divisible among {experts_per_token} experts per token and their router:"
        f" the arm cannot match the dense one within {MATCH_TOLERANCE:.0%}"
        f" (the next that can: model.ffn_width={fits}; or set layout.expert_width)"
    )


def _nearest_width(ffn_width: int, experts_per_token: int, router_in_widths: float) -> int | None:
    exact = (ffn_width - router_in_widths) / experts_per_token
    for unit in (4, 1):
        width = round(exact / unit) * unit
        excess = (width * experts_per_token + router_in_widths) / ffn_width - 1
        if width >= 1 and abs(excess) <= MATCH_TOLERANCE:
            return width
    return None


LAYOUTS: Registry[type[Layout], LayoutFacts] = Registry("layout", "moebench.experts.layouts")
