"""The table and the figure of a run's history."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from moebench.analysis.dynamics.history import NUM_RANDOM, CheckpointMeasure, History
from moebench.analysis.specialisation.figures import select_layers
from moebench.errors import build_unknown_error
from moebench.reporting.canvas import GREY, line_style, new_figure
from moebench.reporting.formatting import MISSING, format_number
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

COLUMNS = (
    "saturation",
    "by chance",
    "churn",
    "changed",
    "changes later",
    "similar pairs",
    "similar to final",
    "co-activation",
    "at random",
)
NOTES = (
    "saturation: share of a token's experts that the trained model chooses, too (OLMoE, arXiv:2409.02060, 5.1);"
    " by chance: for independent choices with these loads.",
    "churn: share of a token's experts that are others than at the checkpoint before; changed: tokens with any other"
    " expert; changes later: tokens with any other expert at a later checkpoint.",
    "similar: mean cosine of the weights of two experts, and of an expert with itself in the trained model;"
    " step 0 is the untrained model.",
    "co-activation: share of an expert's tokens that its strongest partner has, too (5.2), mean over experts;"
    f" at random: in {NUM_RANDOM} random routings with the loads and the numbers of experts of this checkpoint.",
)


def build_history_report(history: History, layer: str | None = None) -> Report:
    """Return a row for each layer and checkpoint, or for those of one layer; raise UsageError for an unknown layer."""
    if layer is not None and layer not in history.layers:
        raise build_unknown_error("--layer", layer, history.layers)
    shown = {name: value for name, value in history.layers.items() if layer in (None, name)}
    rows = [
        (name, *_format_checkpoint(checkpoint)) for name, value in shown.items() for checkpoint in value.checkpoints
    ]
    table = Table(
        title=f"Routing over training: {history.title}",
        columns=(
            Column(header="layer", align="left", is_key=True),
            Column(header="step", is_key=True),
            *number_columns(*COLUMNS),
        ),
        rows=tuple(rows),
    )
    size = f"probe set: {history.probe_set.num_tokens} positions of the validation split"
    return Report(tables=(table,), notes=(*history.notes, *NOTES, f"{size}."), values=history.to_dict())


def _format_checkpoint(measure: CheckpointMeasure) -> tuple[str, ...]:
    shares = (
        measure.saturation,
        measure.chance,
        measure.churn,
        measure.changed_tokens,
        measure.still_changing,
    )
    cosines = (measure.pair_similarity, measure.matched_similarity)
    return (
        str(measure.step),
        *map(_format_share, shares),
        *(MISSING if value is None else format_number(value, 3) for value in cosines),
        _format_share(measure.coactivation),
        _format_share(measure.random_mean),
    )


def _format_share(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def draw_history(history: History, path: Path) -> Path:
    """Draw saturation, churn, similarity and co-activation over the steps, one line for each layer."""
    with new_figure(path, f"Routing over training: {history.title}", width=10, height=6.6) as figure:
        (saturation, churn), (similarity, coactivation) = figure.subplots(2, 2)
        _draw_lines(saturation, history, "agreement with the final router", lambda value: value.saturation)
        _draw_lines(saturation, history, "", lambda value: value.chance, is_reference=True)
        _draw_lines(churn, history, "experts changed since the checkpoint before", lambda value: value.churn)
        _draw_lines(similarity, history, "cosine of two experts' weights", lambda value: value.pair_similarity)
        layers = history.layers.values()
        if any(value.random_coactivation for layer in layers for value in layer.checkpoints):
            _draw_lines(coactivation, history, "co-activation: strongest partner", lambda value: value.coactivation)
            _draw_lines(coactivation, history, "", lambda value: value.random_mean, is_reference=True)
        else:
            coactivation.text(0.5, 0.5, "one expert per token:\nno co-activation", ha="center", color=GREY)
            coactivation.set_axis_off()
        for ax in (saturation, churn):
            ax.set_ylim(0, 1.02)
        saturation.legend(frameon=False, fontsize=8, title="layer", ncols=2, loc="lower right")
        figure.supxlabel(
            "step (dotted: by chance, for independent choices or random routings with the same loads)", fontsize=9
        )
    return path


def _draw_lines(
    ax: Axes,
    history: History,
    title: str,
    read: Callable[[CheckpointMeasure], float | None],
    *,
    is_reference: bool = False,
) -> None:
    """Draw one line per layer; a symmetric log scale shows the first percent of training and the untrained model."""
    for index, name in enumerate(select_layers(list(history.layers))):
        values = [(value.step, read(value)) for value in history.layers[name].checkpoints]
        points = [(step, value) for step, value in values if value is not None]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        color = line_style(index + 1)["color"]
        if is_reference:
            ax.plot(xs, ys, color=color, linestyle=":", linewidth=1)
        else:
            ax.plot(xs, ys, color=color, marker="o", markersize=4, label=name)
    if title:
        ax.set_title(title, loc="left")
    _set_step_scale(ax, history)


def _set_step_scale(ax: Axes, history: History) -> None:
    steps = [value.step for value in next(iter(history.layers.values())).checkpoints]
    ax.set_xscale("symlog", linthresh=max(min(step for step in steps if step > 0), 1))
    ax.set_xticks(steps, [str(step) for step in steps])
    ax.minorticks_off()
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
