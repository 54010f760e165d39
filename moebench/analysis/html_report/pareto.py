"""Quality against what it costs: measured FLOPs, parameters and seconds of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moebench.analysis.compare.shown_arms import find_tone, select_arms
from moebench.analysis.compare.values import ArmSummary, Comparison
from moebench.reporting.html.axis import Axis, Tick
from moebench.training.utilization import BACKWARD_FACTOR

WIDTH, HEIGHT = 270, 190
"""Size of the plotting area, in units of its view box."""
CHARACTER, LINE = 5.6, 11.0
"""Width and height of a character of a label, in the same units."""
COSTS: tuple[tuple[str, Callable[[ArmSummary], float]], ...] = (
    ("FLOPs of training, measured", lambda arm: _count_flops(arm)),
    ("total parameters", lambda arm: arm.cost.get("total_params", 0.0)),
    ("seconds of training", lambda arm: _count_tokens(arm) / arm.tokens_per_s if arm.tokens_per_s else 0.0),
)


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One arm in the chart, and where its name stands; empty: there is no room."""

    arm: str
    tone: str
    x: float
    y: float
    is_efficient: bool
    """No arm shown is better and costs no more."""
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"

    @property
    def is_far(self) -> bool:
        """Whether a line must join the name to its mark."""
        return abs(self.label_y - 4 - self.y) > LINE


@dataclass(frozen=True, kw_only=True)
class ParetoChart:
    """Quality over one cost."""

    label: str
    marks: tuple[ParetoPoint, ...]
    frontier: str
    """The steps between efficient arms, as the points of a line."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def build_pareto(comparison: Comparison) -> tuple[ParetoChart, ...]:
    """Return a chart for each cost that is known of two arms or more."""
    charts = (_build_chart(comparison, label, get_cost) for label, get_cost in COSTS)
    return tuple(chart for chart in charts if chart is not None)


def _build_chart(comparison: Comparison, label: str, get_cost: Callable[[ArmSummary], float]) -> ParetoChart | None:
    points = [(arm.arm, get_cost(arm), arm.mean) for arm in select_arms(comparison) if arm.mean is not None]
    points = [point for point in points if point[1] > 0]
    if len(points) < 2:
        return None
    x_axis = Axis.of((cost for _, cost, _ in points), margin=0.12, may_be_log=True)
    y_axis = Axis.of((mean for _, _, mean in points), margin=0.12)
    sign = 1 if comparison.lower_is_better else -1
    efficient = {
        name
        for name, cost, mean in points
        if not any(c <= cost and sign * m <= sign * mean and (c, m) != (cost, mean) for _, c, m in points)
    }
    marks = [
        ParetoPoint(
            arm=name,
            tone=find_tone(comparison, name),
            x=x_axis.place(cost) * WIDTH,
            y=(1 - y_axis.place(mean)) * HEIGHT,
            is_efficient=name in efficient,
        )
        for name, cost, mean in points
    ]
    return ParetoChart(
        label=label,
        marks=tuple(place_labels(marks)),
        frontier=_draw_frontier([mark for mark in marks if mark.is_efficient]),
        x_ticks=tuple(x_axis.find_ticks(3)),
        y_ticks=tuple(y_axis.find_ticks(4)),
    )


def _count_flops(arm: ArmSummary) -> float:
    return BACKWARD_FACTOR * _count_tokens(arm) * arm.cost.get("train_flops_per_token", 0.0)


def _count_tokens(arm: ArmSummary) -> float:
    return arm.cost.get("train_tokens", 0.0)


def _draw_frontier(marks: Sequence[ParetoPoint]) -> str:
    ordered = sorted(marks, key=lambda mark: mark.x)
    points = [(mark.x, mark.y) for mark in ordered[:1]]
    for mark in ordered[1:]:
        points += [(mark.x, points[-1][1]), (mark.x, mark.y)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def place_labels(marks: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Return the marks with their names beside them, where one fits without covering another name or mark."""
    taken = [(mark.x - 4, mark.y - 4, mark.x + 4, mark.y + 4) for mark in marks]
    placed = []
    for mark in sorted(marks, key=lambda mark: (mark.tone != "baseline", not mark.is_efficient, mark.y)):
        width = CHARACTER * len(mark.arm)
        for anchor, x, y in _list_places(mark):
            left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
            box = (left, y - LINE + 2, left + width, y + 2)
            is_inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            if is_inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                placed.append(replace(mark, label=mark.arm, label_x=x, label_y=y, anchor=anchor))
                break
        else:
            placed.append(mark)
    return placed


def _list_places(mark: ParetoPoint) -> list[tuple[str, float, float]]:
    beside = [("start", mark.x + 7, mark.y + dy) for dy in (4, -6, 14, -16, 24)]
    beside += [("end", mark.x - 7, mark.y + dy) for dy in (4, -6, 14, -16, 24)]
    return [*beside, ("middle", mark.x, mark.y - 8), ("middle", mark.x, mark.y + 16)]


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
