"""The tables and the figure of interventions on a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.analysis.interventions.ablations import ALL_LAYERS, Ablation, Ablations
from moebench.analysis.interventions.effect import Effect
from moebench.errors import build_unknown_error
from moebench.reporting.canvas import GREY, line_style, new_figure
from moebench.reporting.formatting import MISSING, format_number, format_signed
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

MAX_ROWS = 10
"""Rows of the tables of experts and of labels: the largest changes."""
NOTES = (
    "change: of the loss in nats per prediction, against the model as trained on the same predictions.",
    "tokens shuffled: each token gets the experts and weights of another token; random router: as other seeds draw it"
    " (V-MoE, arXiv:2106.05974); router of step N: that of an earlier checkpoint, 0 the untrained one; experts stay as"
    " trained.",
    "expert left out: its assignments are dropped and the weights of others stay, as if it returned 0.",
    "by label: changes with an interval without 0, in the order of its end that is nearer to 0.",
    "Intervals are over sequences, and hold for all rows of their kind together with 95 % (Bonferroni), those not shown"
    " included.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelChange:
    """The effect of leaving out one expert on the predictions with one label."""

    ablation: Ablation
    kind: str
    label: str
    effect: Effect


def build_ablation_report(result: Ablations, layer: str | None = None, kind: str | None = None) -> Report:
    """Return the effects of routers, of the experts with the largest effects, and of experts by label.

    `layer`, `kind`: the only layer and the only kind of label to show; raises UsageError for an unknown one.
    """
    layers = list(dict.fromkeys(each.target.layer for each in (*result.routers, *result.experts)))
    if layer is not None and layer not in layers:
        raise build_unknown_error("--layer", layer, layers)
    kinds = list(dict.fromkeys(name for each in (*result.routers, *result.experts) for name in each.by_label))
    if kind is not None and kind not in kinds:
        raise build_unknown_error("--label", kind, kinds)
    tables = (
        _build_router_table(result, layer),
        _build_expert_table(result, layer),
        _build_label_table(result, layer, kind),
    )
    metric = result.metric.replace("_", " ")
    baseline = f"as trained: loss {result.loss:.4f}, {metric} {format_number(result.quality[result.metric])}."
    size = (
        f"probe set: {result.probe_set.num_tokens} positions, {result.probe_set.num_sequences} sequences of validation."
    )
    return Report(
        tables=tuple(table for table in tables if table.rows),
        notes=(*result.notes, f"{result.title}; {baseline}", *NOTES, size),
        values=result.to_dict(),
    )


def _build_router_table(result: Ablations, layer: str | None) -> Table:
    rows = [
        (each.target.layer, each.target.name, *_format_effect(each.effect, len(result.routers)), _metric(each, result))
        for each in result.routers
        if layer in (None, each.target.layer)
    ]
    columns = (
        *_key_columns("layer", "routing"),
        *number_columns("change", "interval", result.metric.replace("_", " ")),
    )
    return Table(title=f"Routers replaced: {result.title}", columns=columns, rows=tuple(rows))


def _build_expert_table(result: Ablations, layer: str | None) -> Table:
    shown = sorted(
        (each for each in result.experts if layer in (None, each.target.layer)),
        key=lambda each: -abs(each.effect.change),
    )
    rows = [
        (
            each.target.layer,
            str(each.target.expert),
            MISSING if each.share is None else f"{100 * each.share:.1f} %",
            *_format_effect(each.effect, len(result.experts)),
            _metric(each, result),
        )
        for each in shown[:MAX_ROWS]
    ]
    columns = (
        *_key_columns("layer", "expert"),
        *number_columns("share", "change", "interval", result.metric.replace("_", " ")),
    )
    intervals = [each.effect.interval(len(result.experts)) for each in shown]
    worse = sum(interval is not None and interval[0] > 0 for interval in intervals)
    better = sum(interval is not None and interval[1] < 0 for interval in intervals)
    note = f"of {len(shown)} experts {worse} raise the loss when left out, {better} lower it, by the interval"
    return Table(
        title=f"Experts left out: the largest {len(rows)} of {len(shown)}",
        columns=columns,
        rows=tuple(rows),
        notes=(note,),
    )


def _build_label_table(result: Ablations, layer: str | None, kind: str | None) -> Table:
    changes = [each for each in list_label_changes(result.experts) if kind in (None, each.kind)]
    changes = [each for each in changes if layer in (None, each.ablation.target.layer)]
    certain = {each: _certain_change(each.effect, result.num_label_tests) for each in changes}
    largest = sorted((each for each in changes if certain[each] > 0), key=lambda each: -certain[each])
    rows = [
        (
            each.ablation.target.layer,
            str(each.ablation.target.expert),
            f"{each.kind}: {each.label}",
            *_format_effect(each.effect, result.num_label_tests),
            format_signed(each.ablation.effect.change, 4),
        )
        for each in largest[:MAX_ROWS]
    ]
    columns = (*_key_columns("layer", "expert", "label"), *number_columns("change", "interval", "of all"))
    return Table(
        title=f"Experts left out, by label: the largest {len(rows)} of {len(largest)} changes that are not 0",
        notes=(f"of {len(changes)} pairs of an expert and a label {len(largest)} have an interval without 0",),
        columns=columns,
        rows=tuple(rows),
    )


def list_label_changes(experts: Sequence[Ablation]) -> Iterator[LabelChange]:
    """Yield the effects that have an interval."""
    for ablation in experts:
        for kind, effects in ablation.by_label.items():
            for label, effect in effects.items():
                if effect.error is not None:
                    yield LabelChange(ablation=ablation, kind=kind, label=label, effect=effect)


def _certain_change(effect: Effect, num_comparisons: int) -> float:
    """Return how far the interval is from 0, negative where it covers 0: rare labels vary most and are known least."""
    low, high = effect.interval(num_comparisons) or (-np.inf, np.inf)
    return max(low, -high)


def _key_columns(*headers: str) -> tuple[Column, ...]:
    return tuple(Column(header=header, align="left", is_key=True) for header in headers)


def _format_effect(effect: Effect, num_comparisons: int) -> tuple[str, str]:
    interval = effect.interval(num_comparisons)
    bounds = MISSING if interval is None else " to ".join(format_signed(bound, 4) for bound in interval)
    return format_signed(effect.change, 4), bounds


def _metric(ablation: Ablation, result: Ablations) -> str:
    return format_number(ablation.quality[result.metric])


def draw_ablations(result: Ablations, path: Path) -> Path:
    """Draw the change of the loss by layer for each replaced router, and by layer and expert for each one left out."""
    layers = [name for name in dict.fromkeys(each.target.layer for each in result.routers) if name != ALL_LAYERS]
    layers = layers or list(dict.fromkeys(each.target.layer for each in result.experts))
    parts = [bool(result.routers), bool(result.experts)]
    height = 3.6 * parts[0] + (1.6 + 0.25 * len(layers)) * parts[1] + 0.4
    with new_figure(path, f"Interventions: {result.title}", width=8.5, height=height) as figure:
        ratios = [ratio for ratio, is_drawn in zip((3.6, 1.6 + 0.25 * len(layers)), parts, strict=True) if is_drawn]
        axes = figure.subplots(sum(parts), 1, squeeze=False, height_ratios=ratios)[:, 0]
        if parts[0]:
            _draw_routers(axes[0], result)
        if parts[1]:
            _draw_experts(figure, axes[-1], result, layers)
    return path


def _draw_routers(ax: Axes, result: Ablations) -> None:
    names = list(dict.fromkeys(each.target.name for each in result.routers))
    layers = list(dict.fromkeys(each.target.layer for each in result.routers))
    for index, name in enumerate(names):
        of_name = {each.target.layer: each.effect for each in result.routers if each.target.name == name}
        xs = [layers.index(layer) + (index - (len(names) - 1) / 2) * 0.8 / len(names) for layer in of_name]
        ys = [effect.change for effect in of_name.values()]
        color = line_style(index + 1)["color"]
        intervals = [effect.interval(len(result.routers)) or (effect.change,) * 2 for effect in of_name.values()]
        errors = np.array([[y - low, high - y] for y, (low, high) in zip(ys, intervals, strict=True)]).T
        ax.errorbar(xs, ys, yerr=errors, fmt="o", markersize=4, capsize=2, color=color, label=name)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(layers)), [f"layer {name}" if name != ALL_LAYERS else "all layers" for name in layers])
    ax.set_ylabel("change of the loss (nats)")
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    ax.set_title("routers replaced", loc="left")


def _draw_experts(figure: Figure, ax: Axes, result: Ablations, layers: Sequence[str]) -> None:
    num_experts = 1 + max(each.target.expert or 0 for each in result.experts)
    table = np.full((len(layers), num_experts), np.nan)
    for each in result.experts:
        table[layers.index(each.target.layer), each.target.expert or 0] = each.effect.change
    bound = max(float(np.nanmax(np.abs(table))), 1e-9)
    image = ax.imshow(table, aspect="auto", cmap="PuOr_r", vmin=-bound, vmax=bound, interpolation="nearest")
    ax.set_yticks(range(len(layers)), layers)
    ax.set_ylabel("layer")
    ax.set_xlabel("expert")
    ax.set_title("expert left out: change of the loss (nats)", loc="left")
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, pad=0.01)
