"""Positions of labels in a figure, such that none overlaps another."""

from collections.abc import Sequence

TOP_LABEL = 0.97
"""Highest position of a label in the axes, below the line of text above them."""


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """Return ascending positions with gaps of at least `gap`, all between 0 and TOP_LABEL."""
    stacks: list[list[float]] = []
    for position in positions:
        stacks.append([position])
        while len(stacks) > 1 and _lowest(stacks[-1], gap) < _lowest(stacks[-2], gap) + gap * len(stacks[-2]):
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    return [_lowest(stack, gap) + index * gap for stack in stacks for index in range(len(stack))]


def _lowest(stack: Sequence[float], gap: float) -> float:
    """Return the lowest position of a stack that is centred on its labels' positions and kept in bounds."""
    height = gap * (len(stack) - 1)
    return max(min(sum(stack) / len(stack) - height / 2, TOP_LABEL - height), 0.0)
