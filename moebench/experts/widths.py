"""How wide experts are: the width that makes an arm cost what the dense one costs, solved on the modules' own count."""

from collections.abc import Callable
from dataclasses import dataclass

from moebench.errors import UsageError

MATCH_TOLERANCE = 0.02
"""Arms whose active FLOPs differ by more than this are not matched."""

FURTHEST = 4000
"""How many wider dense networks are tried for the hint of a refusal."""


@dataclass(frozen=True)
class Widths:
    """Relative widths to hidden units."""

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
    """Return the widths with which `cost` is `target(ffn_width)`: what the dense network of that width costs.

    `cost` rises linearly with the unit but for rounding; two large units give the line. Widths are multiples of `step`
    where that stays within 2 % of the dense feed-forward part, else units. Raises UsageError when no width does; it
    says `what` does not fit and names the next ffn_width that does.
    """
    low, high = cost(Widths(4096)), cost(Widths(8192))
    slope = (high - low) / 4096
    without_experts = low - 4096 * slope
    dense, per_width = target(0), target(1) - target(0)

    def fitting(ffn_width: int) -> Widths | None:
        wanted = dense + per_width * ffn_width
        for multiple in (step, 1):
            widths = Widths((wanted - without_experts) / slope, multiple)
            if abs(cost(widths) - wanted) <= MATCH_TOLERANCE * per_width * ffn_width * (1 + 1e-9):
                return widths
        return None

    widths = fitting(ffn_width)
    if widths is not None:
        return widths
    first = max(ffn_width + 1, int((without_experts - dense) / per_width))
    fits = next((other for other in range(first, first + FURTHEST) if fitting(other)), None)
    hint = f"the next that can: model.ffn_width={fits}" if fits else f"none up to {first + FURTHEST} can"
    left = dense + per_width * ffn_width > without_experts
    problem = f"is not divisible among {what}" if left else f"leaves nothing for {what}, which cost as much without it"
    raise UsageError(
        f"model.ffn_width={ffn_width} {problem}: the arm cannot match the dense one within {MATCH_TOLERANCE:.0%}"
        f" ({hint}; or set {remedy})"
    )
