"""The figure of a comparison: learning curves with bands over seeds, beside the paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from moebench.analysis.compare.learning_curve import Curve, Points, arm_curve
from moebench.analysis.compare.values import Comparison, Difference
from moebench.analysis.specialisation.load_figure import draw_load
from moebench.reporting.canvas import GREY, look, sheet
from moebench.reporting.formatting import count

__all__ = ["draw_curves", "draw_load"]

TOP_LABEL = 0.97  # of the axes: clear of the line of words above
WARM_UP = 0.5  # of the run: the steep start is left out of the y limits, or all arms look the same


MOST_BANDS = 12
"""Of more arms, bands lie over each other and say nothing: they are left out."""


def draw_curves(
    journals: Mapping[str, Mapping[int, Points]],
    metric: str = "eval/bits_per_byte",
    *,
    path: Path,
    title: str,
    comparison: Comparison | None = None,
    tokens_per_step: float | None = None,
    lower_is_better: bool = True,
) -> Path:
    """Draw the mean of each arm over its seeds with a band, and the differences if a comparison is given.

    `journals` holds the points of arm -> seed; x is training tokens with `tokens_per_step`, else steps.
    Raises ValueError when no arm has a finite point of the metric.
    """
    curves = [curve for arm, seeds in journals.items() if (curve := arm_curve(arm, seeds, metric))]
    if not curves:
        raise ValueError(f"no point of {metric} in the journals of {', '.join(journals) or 'no arm'}")
    for arm in comparison.arms if comparison else ():
        curves = [replace(curve, num_diverged=arm.num_diverged) if curve.arm == arm.arm else curve for curve in curves]
    looks = {arm: look(index) for index, arm in enumerate(journals)}
    height = max(4.4, 1.2 + 0.3 * len(curves))
    with sheet(path, title, width=12.0 if comparison else 7.5, height=height) as figure:
        if comparison:
            left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
            _draw_forest(right, comparison, looks)
        else:
            left = figure.subplots()
        _draw_lines(left, curves, looks, metric, tokens_per_step, lower_is_better)
    return path


def _draw_lines(
    ax: Axes,
    curves: Sequence[Curve],
    looks: Mapping[str, dict[str, str]],
    metric: str,
    tokens_per_step: float | None,
    lower_is_better: bool,
) -> None:
    scale = tokens_per_step or 1.0
    for curve in curves:
        style, color = looks[curve.arm]["linestyle"], looks[curve.arm]["color"]
        x = curve.steps * scale
        ax.plot(x, curve.means, style, color=color, linewidth=1.6)
        if len(curves) <= MOST_BANDS:
            ax.fill_between(x, curve.lows, curve.highs, color=color, alpha=0.1, linewidth=0)
    last = max(float(curve.steps[-1]) for curve in curves)
    bottom, top = _limits(curves, last)
    inside = [curve.steps[(curve.means >= bottom) & (curve.means <= top)] for curve in curves]
    first = min(float(steps[0]) for steps in inside if len(steps))
    ax.set_xlim(first * scale * 0.95, last * scale)  # no empty paper before the curves come into view
    ax.set_ylim(bottom, top)
    _label_ends(ax, curves, looks, scale)
    name = metric.removeprefix("eval/").replace("_", " ")
    ax.set_ylabel(f"{name} ({'lower' if lower_is_better else 'higher'} is better)")
    ax.set_xlabel("training tokens" if tokens_per_step else "optimizer step")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ax.set_title(_band_words(curves), loc="left", color=GREY, fontsize=8)


def _limits(curves: Sequence[Curve], last: float) -> tuple[float, float]:
    """Return y limits that show the means after the warm-up, and their bands as far as these are close."""
    late = [(curve, curve.steps >= WARM_UP * last) for curve in curves]
    means = np.concatenate([curve.means[kept] for curve, kept in late])
    low, high = float(means.min()), float(means.max())
    margin = max(high - low, 1e-3 * abs(high), 1e-9)
    bottoms = np.concatenate([curve.lows[kept] for curve, kept in late])
    tops = np.concatenate([curve.highs[kept] for curve, kept in late])
    if len(curves) > MOST_BANDS:
        return low - 0.06 * margin, high + 0.06 * margin
    bottom, top = max(float(bottoms.min()), low - margin), min(float(tops.max()), high + margin / 2)
    return bottom - 0.06 * margin, top + 0.06 * margin


def _label_ends(ax: Axes, curves: Sequence[Curve], looks: Mapping[str, dict[str, str]], scale: float) -> None:
    """Write each arm's name beside its last point, spread so that no two names touch."""
    (left, _), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    gap = 0.22 * ax.figure.dpi / ax.figure.bbox.height  # 0.22 inch between names, as a share of the figure
    ends = sorted(curves, key=lambda curve: float(curve.means[-1]))
    places = spread([(float(curve.means[-1]) - bottom) / (top - bottom) for curve in ends], gap)
    for curve, place in zip(ends, places, strict=True):
        x, y, color = float(curve.steps[-1]) * scale, float(curve.means[-1]), looks[curve.arm]["color"]
        seen = x >= left and bottom <= y <= top
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            _end_label(curve, seen=seen),
            xy=(max(x, left), min(max(y, bottom), top)),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            color=color,
            arrowprops=arrow if seen else None,
            annotation_clip=False,
        )


def _end_label(curve: Curve, *, seen: bool) -> str:
    lost = [f"{curve.num_seeds} of {curve.num_started} seeds"] if curve.num_seeds < curve.num_started else []
    lost += [f"{curve.num_diverged} diverged"] if curve.num_diverged else []
    name = f"{curve.arm} ({', '.join(lost)})" if lost else curve.arm
    return name if seen else f"{name}: {curve.means[-1]:.3g} at step {curve.steps[-1]:.0f}"


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move ascending places until each is `gap` above the one below; all stay between 0 and TOP_LABEL."""
    stacks: list[list[float]] = []
    for place in wanted:
        stacks.append([place])
        while len(stacks) > 1 and _foot(stacks[-1], gap) < _foot(stacks[-2], gap) + gap * len(stacks[-2]):
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    return [_foot(stack, gap) + index * gap for stack in stacks for index in range(len(stack))]


def _foot(stack: Sequence[float], gap: float) -> float:
    """Return the lowest place of a stack that is centred on its wishes and kept in bounds."""
    height = gap * (len(stack) - 1)
    return max(min(sum(stack) / len(stack) - height / 2, TOP_LABEL - height), 0.0)


def _band_words(curves: Sequence[Curve]) -> str:
    words = {"t": "95 % t interval over", "range": "lowest to highest of", "none": "none for"}
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.band, []).append(curve)
    parts = []
    for band, group in found.items():
        fewest, most = (choose(curve.num_seeds for curve in group) for choose in (min, max))
        seeds = count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
        names = "" if len(found) == 1 else f" ({', '.join(curve.arm for curve in group)})"
        parts.append(f"{words[band]} {seeds}{names}")
    return "line: mean; band: " + "; ".join(parts) if len(curves) <= MOST_BANDS else "line: mean over seeds"


def _draw_forest(ax: Axes, comparison: Comparison, looks: Mapping[str, dict[str, str]]) -> None:
    """Draw one row per arm: its difference to the baseline, the 95 % interval, and the verdict in words."""
    shown = [each for each in comparison.differences if each.mean is not None or each.verdict == "diverged"]
    for row, difference in enumerate(shown):
        color = looks.get(difference.arm, {"color": GREY})["color"]
        _draw_difference(ax, row, difference, color, comparison.describe_verdict(difference.arm))
    ax.axvline(0, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
    ax.set_yticks(range(len(shown)), [difference.arm for difference in shown])
    ax.set_ylim(max(len(shown), 1) - 0.5, -0.5)  # first arm on top
    ax.margins(x=0.12)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    side = "left" if comparison.lower_is_better else "right"
    ax.set_xlabel(f"{comparison.metric.replace('_', ' ')} minus {comparison.baseline}\n(better to the {side})")
    title = f"paired difference ({comparison.split}), 95 % interval; verdict by p Holm"
    ax.set_title(title, loc="left", color=GREY, fontsize=8)
    if not shown:
        ax.text(0.5, 0.5, "no seed in common yet", transform=ax.transAxes, ha="center", color=GREY)


def _draw_difference(ax: Axes, row: int, difference: Difference, color: str, verdict: str) -> None:
    if difference.interval:
        ax.plot(difference.interval, [row, row], color=color, linewidth=2.2, solid_capstyle="round")
    if difference.mean is not None:  # of an arm that diverged in every seed there is nothing but the words
        fill = color if difference.verdict in ("better", "worse") else "white"
        ax.plot([difference.mean], [row], "o", markersize=6, color=color, markerfacecolor=fill)
    ax.annotate(
        f"{verdict}, {count(len(difference.seeds), 'seed')}" if difference.seeds else verdict,
        xy=(1.03, row),
        xycoords=("axes fraction", "data"),
        va="center",
        annotation_clip=False,
    )
