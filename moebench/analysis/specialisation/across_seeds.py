"""What experts say about labels over the seeds of an arm, with intervals: a claim needs more than one run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.compare.experiment import list_trained_cells
from moebench.analysis.specialisation.layer_information import LayerInformation
from moebench.analysis.specialisation.measure import ProbeOptions, RunInformation, measure_run
from moebench.analysis.statistics.intervals import t_interval
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.routing.router import ROUTERS
from moebench.runs.folder import RunFolder

NEIGHBOURS = (("previous_id", "token_id"), ("next_id", "token_id"), ("previous_id", "next_id"))
"""Kinds of labels of text that are compared with each other in each layer."""


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """A number of each seed, its mean, and an interval that holds for all rows of its table together."""

    values: tuple[float, ...]
    num_rows: int
    """Rows of the table, for which the interval is corrected (Bonferroni)."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def interval(self) -> st.Interval | None:
        """95 % t interval for all rows together; None below three seeds."""
        if len(self.values) < st.MIN_SEEDS:
            return None
        return t_interval(self.mean, stdev(self.values), len(self.values), self.num_rows)

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0; 0: undecided."""
        low, high = self.interval or (-1.0, 1.0)
        return 1 if low > 0 else -1 if high < 0 else 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "mean": self.mean,
            "interval": list(self.interval) if self.interval else None,
            "seeds": list(self.values),
            "sign": self.sign,
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """Information of one arm, kind of label and layer over seeds, in bits."""

    arm: str
    kind: str
    layer: str
    trained: SeedMean
    of_routing: SeedMean
    minus_untrained: SeedMean
    given_token: SeedMean | None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A difference in bits between two layers or two kinds of labels of the same runs."""

    arm: str
    name: str
    difference: SeedMean


@dataclass(frozen=True, kw_only=True)
class PooledInformation:
    """The runs of an experiment, pooled by arm."""

    experiment: str
    rows: tuple[Row, ...]
    depth: tuple[Contrast, ...]
    """Last minus first layer, for each kind of label."""
    neighbours: tuple[Contrast, ...]
    """One kind of label minus another, in each layer."""
    seeds: dict[str, list[int]]
    """Arm -> seeds."""
    notes: tuple[str, ...]
    runs: tuple[RunInformation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        contrasts = {"depth": self.depth, "neighbours": self.neighbours}
        return {
            "unit": "bits",
            "seeds": self.seeds,
            "rows": [
                {
                    "arm": row.arm,
                    "label": row.kind,
                    "layer": row.layer,
                    "bits": row.trained.to_dict(),
                    "of_routing": row.of_routing.to_dict(),
                    "minus_untrained_bits": row.minus_untrained.to_dict(),
                    "given_token_bits": row.given_token.to_dict() if row.given_token else None,
                }
                for row in self.rows
            ],
            **{
                name: [{"arm": part.arm, "name": part.name, "bits": part.difference.to_dict()} for part in parts]
                for name, parts in contrasts.items()
            },
            "notes": list(self.notes),
        }


def probe_experiment(
    experiment: Experiment,
    results: Path,
    options: ProbeOptions,
    report_progress: Callable[[str], None] = lambda line: None,
) -> PooledInformation:
    """Probe every finished run of the arms that have experts; raise UsageError where there is none."""
    cells = [cell for cell in list_trained_cells(experiment, results) if _has_experts(cell.config.router.name)]
    done = [cell for cell in cells if RunFolder.of(results, cell.id).state() == "done"]
    if not done:
        raise UsageError(
            f"{results}: no run with experts of '{experiment.name}' is done there (train it with `moebench run`)"
        )
    by_arm: dict[str, list[RunInformation]] = {}
    for cell in done:
        run = TrainedRun.open(results, cell.id, cell.plugins)
        by_arm.setdefault(cell.arm, []).append(measure_run(run, options))
        report_progress(f"{cell.arm}, seed {cell.seed} ({cell.id})")
    expected = {arm: sum(cell.arm == arm for cell in cells) for arm in by_arm}
    notes = [
        f"{arm}: {len(runs)} of {expected[arm]} runs are done; the others are left out"
        for arm, runs in by_arm.items()
        if len(runs) < expected[arm]
    ]
    return pool(experiment.name, by_arm, notes)


def _has_experts(router: str) -> bool:
    return not ROUTERS.get(router).item.form.is_dense


def pool(name: str, by_arm: Mapping[str, Sequence[RunInformation]], notes: Sequence[str] = ()) -> PooledInformation:
    """Return means and differences over the runs of each arm."""
    keys = [
        (arm, kind, layer) for arm, runs in by_arm.items() for kind, layers in runs[0].kinds.items() for layer in layers
    ]
    rows = tuple(_build_row(by_arm[arm], arm, kind, layer, len(keys)) for arm, kind, layer in keys)
    return PooledInformation(
        experiment=name,
        rows=rows,
        depth=tuple(_compare_depth(by_arm)),
        neighbours=tuple(_compare_neighbours(by_arm)),
        seeds={arm: [run.seed for run in runs] for arm, runs in by_arm.items()},
        notes=tuple(notes),
        runs=tuple(run for runs in by_arm.values() for run in runs),
    )


def _build_row(runs: Sequence[RunInformation], arm: str, kind: str, layer: str, num_rows: int) -> Row:
    values = [run.kinds[kind][layer] for run in runs]

    def over_seeds(read: Callable[[LayerInformation], float]) -> SeedMean:
        return SeedMean(values=tuple(read(value) for value in values), num_rows=num_rows)

    has_given = all(value.given_token is not None for value in values)
    return Row(
        arm=arm,
        kind=kind,
        layer=layer,
        trained=over_seeds(lambda value: value.trained.corrected),
        of_routing=over_seeds(lambda value: value.trained.of_routing),
        minus_untrained=over_seeds(lambda value: value.trained.corrected - value.controls["untrained"].corrected),
        given_token=over_seeds(_read_given_token) if has_given else None,
    )


def _read_given_token(value: LayerInformation) -> float:
    assert value.given_token is not None
    return value.given_token.corrected


def _compare_depth(by_arm: Mapping[str, Sequence[RunInformation]]) -> list[Contrast]:
    """Compare the first and the last layer of each stack."""
    pairs = []
    for arm, runs in by_arm.items():
        for kind, layers in runs[0].kinds.items():
            for stack in dict.fromkeys(layer.rpartition(".")[0] for layer in layers):
                in_stack = [layer for layer in layers if layer.rpartition(".")[0] == stack]
                if len(in_stack) > 1:
                    name = f"{kind}: layer {in_stack[-1]} minus {in_stack[0]}"
                    pairs.append((arm, name, (kind, in_stack[-1]), (kind, in_stack[0])))
    return _build_contrasts(by_arm, pairs)


def _compare_neighbours(by_arm: Mapping[str, Sequence[RunInformation]]) -> list[Contrast]:
    pairs = [
        (arm, f"layer {layer}: {first} minus {second}", (first, layer), (second, layer))
        for arm, runs in by_arm.items()
        for first, second in NEIGHBOURS
        if {first, second} <= set(runs[0].kinds)
        for layer in runs[0].kinds[first]
    ]
    return _build_contrasts(by_arm, pairs)


def _build_contrasts(
    by_arm: Mapping[str, Sequence[RunInformation]], pairs: Sequence[tuple[str, str, tuple[str, str], tuple[str, str]]]
) -> list[Contrast]:
    def read(run: RunInformation, key: tuple[str, str]) -> float:
        return run.kinds[key[0]][key[1]].trained.corrected

    return [
        Contrast(
            arm=arm,
            name=name,
            difference=SeedMean(
                values=tuple(read(run, first) - read(run, second) for run in by_arm[arm]), num_rows=len(pairs)
            ),
        )
        for arm, name, first, second in pairs
    ]
