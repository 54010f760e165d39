"""The report and the figure of the experts per token of one arm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.analysis import statistics as st
from moebench.analysis.token_compute.correlation import Values, bootstrap_interval, spearman
from moebench.analysis.token_compute.measure import TokenTable
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.reporting.formatting import MISSING, format_percent, format_signed
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

ALL_LAYERS = "all, mean"
NUM_BINS = 10
"""Tenths of the tokens by difficulty in the figure."""
BUCKETS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, None))
"""Smallest and largest number of experts of the columns of the histogram."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's correlation of the experts of a token with a loss of it."""

    value: float | None
    interval: tuple[float, float] | None
    """Over sequences."""

    def to_text(self) -> str:
        """Return the value and its interval."""
        if self.value is None:
            return MISSING
        interval = (
            f" [{format_signed(self.interval[0], 3)}, {format_signed(self.interval[1], 3)}]" if self.interval else ""
        )
        return f"{format_signed(self.value, 3)}{interval}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


@dataclass(frozen=True, kw_only=True)
class LayerCompute:
    """Experts per token in one layer, or their mean over the layers."""

    layer: str
    mean: float
    sd: float
    histogram: dict[str, int]
    """Number of experts -> tokens; of all layers together: pairs of token and layer."""
    dense: Correlation | None
    """With the loss under the dense arm; None without one."""
    own: Correlation
    """With the loss under the arm itself."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "mean": self.mean,
            "sd": self.sd,
            "histogram": self.histogram,
            "spearman_dense_loss": self.dense.to_dict() if self.dense else None,
            "spearman_own_loss": self.own.to_dict(),
        }


def summarise_layers(table: TokenTable) -> list[LayerCompute]:
    """Return each layer, and the mean over all of them where there are several."""
    counts = table.count
    layers = [_summarise(name, count_N.astype(np.float64), count_N, table) for name, count_N in counts.items()]
    if len(layers) == 1:
        return layers
    pooled = np.concatenate(list(counts.values()))  # rounding a token's mean would hide tokens of half an expert
    return [*layers, _summarise(ALL_LAYERS, table.mean_count, pooled, table)]


def _summarise(name: str, count_N: Values, counted: NDArray[Any], table: TokenTable) -> LayerCompute:
    def correlate(loss_N: Values) -> Correlation:
        return Correlation(
            value=spearman(count_N, loss_N), interval=bootstrap_interval(count_N, loss_N, table.sequence)
        )

    numbers, tokens = np.unique(np.rint(counted).astype(int), return_counts=True)
    return LayerCompute(
        layer=name,
        mean=float(count_N.mean()),
        sd=float(count_N.std()),
        histogram={str(number): int(n) for number, n in zip(numbers, tokens, strict=True)},
        dense=None if table.dense_loss is None else correlate(table.dense_loss),
        own=correlate(table.own_loss),
    )


def build_report(arm: str, tables: dict[int, TokenTable]) -> Report:
    """Return the report of an arm by seed, the run that was asked for first."""
    first = next(iter(tables))
    layers = summarise_layers(tables[first])
    notes = [
        "Difficulty is the loss, in nats, of the prediction that is made at the token (of its sequence, where tokens"
        " predict nothing of their own): under the dense arm of the same seed, and under the arm itself, which may"
        " be lower because more experts were used. Intervals: 95 %, bootstrap over the sequences of the test split."
    ]
    if tables[first].dense_loss is None:
        notes.append(f"No finished dense run with the task, model, training and seed of {arm} is in the results.")
    over_seeds, values = _compare_seeds(arm, tables)
    return Report(
        tables=(_histogram_table(arm, first, layers), _correlation_table(layers), *over_seeds),
        notes=tuple(notes),
        values={"layers": {layer.layer: layer.to_dict() for layer in layers}, "seeds": values},
    )


def _histogram_table(arm: str, seed: int, layers: Sequence[LayerCompute]) -> Table:
    def name(bucket: tuple[int, int | None]) -> str:
        low, high = bucket
        return f"{low} or more" if high is None else str(low) if low == high else f"{low}-{high}"

    def share(layer: LayerCompute, bucket: tuple[int, int | None]) -> float:
        low, high = bucket
        counts = {int(number): n for number, n in layer.histogram.items()}
        inside = [n for number, n in counts.items() if low <= number and (high is None or number <= high)]
        return sum(inside) / sum(layer.histogram.values())

    return Table(
        title=f"Experts per token on the test split: {arm}, seed {seed}",
        columns=(
            Column(header="layer", align="left", is_key=True),
            *(Column(header=header) for header in ("mean", "sd", *map(name, BUCKETS))),
        ),
        rows=tuple(
            (
                layer.layer,
                f"{layer.mean:.3f}",
                f"{layer.sd:.3f}",
                *(format_percent(share(layer, bucket)) for bucket in BUCKETS),
            )
            for layer in layers
        ),
    )


def _correlation_table(layers: Sequence[LayerCompute]) -> Table:
    return Table(
        title="Spearman's correlation of experts per token with difficulty",
        columns=(
            Column(header="layer", align="left", is_key=True),
            Column(header="loss under the dense arm"),
            Column(header="loss under the arm itself"),
        ),
        rows=tuple(
            (layer.layer, layer.dense.to_text() if layer.dense else MISSING, layer.own.to_text()) for layer in layers
        ),
    )


def _compare_seeds(arm: str, tables: dict[int, TokenTable]) -> tuple[tuple[Table, ...], dict[str, Any]]:
    """Return a table over the seeds of the arm, if there are several, and its values."""
    columns: dict[str, Callable[[TokenTable], float | None]] = {
        "loss under the dense arm": lambda table: (
            None if table.dense_loss is None else spearman(table.mean_count, table.dense_loss)
        ),
        "loss under the arm itself": lambda table: spearman(table.mean_count, table.own_loss),
    }
    values: dict[str, Any] = {}
    rows = []
    for name, read in columns.items():
        by_seed = {seed: value for seed, table in tables.items() if (value := read(table)) is not None}
        interval = st.mean_interval(list(by_seed.values())) if len(by_seed) > 1 else None
        mean = sum(by_seed.values()) / len(by_seed) if by_seed else None
        values[name] = {
            "by_seed": {str(seed): value for seed, value in by_seed.items()},
            "mean": mean,
            "interval": list(interval) if interval else None,
        }
        rows.append((name, str(len(by_seed)), Correlation(value=mean, interval=interval).to_text()))
    table = Table(
        title=f"The same over the seeds of {arm}, mean over layers, 95 % t interval",
        columns=(Column(header="difficulty", align="left", is_key=True), Column(header="seeds"), Column(header="mean")),
        rows=tuple(rows),
    )
    return ((table,) if len(tables) > 1 else ()), values


def draw_report(arm: str, seed: int, table: TokenTable, path: Path) -> Path:
    """Draw the histogram of each layer, and the mean number of experts by tenths of difficulty."""
    loss_N, source = (table.own_loss, arm) if table.dense_loss is None else (table.dense_loss, "the dense arm")
    with new_figure(path, f"Experts per token: {arm}, seed {seed}", width=8.0, height=3.6) as figure:
        left, right = figure.subplots(1, 2)
        width = 0.8 / len(table.count)
        for index, (layer, count_N) in enumerate(table.count.items()):
            share_K = np.bincount(count_N) / len(count_N)
            xs = np.arange(len(share_K)) + (index - (len(table.count) - 1) / 2) * width
            color = PALETTE[1 + index % (len(PALETTE) - 1)]
            left.bar(xs, share_K, width=width, color=color, label=f"layer {layer}")
            right.plot(range(1, NUM_BINS + 1), _mean_by_tenths(count_N, loss_N), marker="o", markersize=4, color=color)
        right.axhline(float(table.mean_count.mean()), color=GREY, linewidth=0.8, linestyle=":")
        left.set_xlabel("experts per token")
        left.set_ylabel("share of tokens")
        left.legend(frameon=False)
        right.set_xlabel(f"tenth of tokens by loss under {source}")
        right.set_ylabel("mean experts per token")
    return path


def _mean_by_tenths(count_N: np.ndarray[Any, Any], loss_N: Values) -> list[float]:
    order_N = np.argsort(loss_N, kind="stable")
    return [float(count_N[part].mean()) for part in np.array_split(order_N, NUM_BINS)]
