"""Widths of experts: solved so that an arm costs as much as the dense one, by the cost that its modules report."""

from collections.abc import Callable
from dataclasses import dataclass

from moebench.errors import UsageError

MATCH_TOLERANCE = 0.02
"""Arms whose active FLOPs differ by more than this are not matched."""

MAX_HINT_DISTANCE = 4000
"""Number of wider dense networks tried for the hint in a refusal."""


@dataclass(frozen=True)
class Widths:
    """Converts relative widths to hidden units."""

    unit: float
    step: int = 1
    """Hidden widths are multiples of this."""

    def of(self, relative: float) -> int:
        """Return the hidden width of an expert, at least one step."""
        return max(round(relative * self.unit / self.step), 1) * self.step


def solve_widths(
    cost: Callable[[Widths], float],
    target: Callable[[int], float],
    ffn_width: int,
    *,
    step: int,
    what: str,
    remedy: str,
) -> Widths:
    """Return the widths at which `cost` equals `target(ffn_width)`, the cost of the dense network of that width.

    Except for rounding, `cost` is linear in the unit; two large units give the line. Widths are multiples of `step`
    where that is within 2 % of the dense feed-forward part, else of 1. Raises UsageError when no width is; the message
    names `what`, which does not fit, and the next ffn_width that does.
    """
    low, high = cost(Widths(4096)), cost(Widths(8192))
    slope = (high - low) / 4096
    without_experts = low - 4096 * slope
    dense, per_width = target(0), target(1) - target(0)

    def solve(ffn_width: int) -> Widths | None:
        dense_cost = dense + per_width * ffn_width
        for multiple in (step, 1):
            widths = Widths((dense_cost - without_experts) / slope, multiple)
            if abs(cost(widths) - dense_cost) <= MATCH_TOLERANCE * per_width * ffn_width * (1 + 1e-9):
                return widths
        return None

    widths = solve(ffn_width)
    if widths is not None:
        return widths
    first = max(ffn_width + 1, int((without_experts - dense) / per_width))
    fits = next((other for other in range(first, first + MAX_HINT_DISTANCE) if solve(other)), None)
    hint = f"the next that can: model.ffn_width={fits}" if fits else f"none up to {first + MAX_HINT_DISTANCE} can"
    has_budget = dense + per_width * ffn_width > without_experts
    problem = (
        f"is not divisible among {what}" if has_budget else f"leaves nothing for {what}, which cost as much without it"
    )
    raise UsageError(
        f"model.ffn_width={ffn_width} {problem}: the arm cannot match the dense one within {MATCH_TOLERANCE:.0%}"
        f" ({hint}; or set {remedy})"
    )
