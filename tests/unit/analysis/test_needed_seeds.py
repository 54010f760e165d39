"""Seeds that settle an arm, what pairing gains, and the power of a planned experiment."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.comparison_runs import DENSE, list_cells, make_result, make_results, with_own_jitter

from moebench.analysis import statistics as st
from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.report import build_report
from moebench.analysis.design.pairing import measure_pairing
from moebench.analysis.design.power import (
    MAX_SEEDS,
    compute_equivalence_power,
    compute_needed_seeds,
    count_seeds_for_difference,
    count_seeds_for_equivalence,
)
from moebench.analysis.seed_planning.planned_power import plan_power
from moebench.experiment.grid import expand
from moebench.runs.folder import RunFolder


def test_seeds_for_a_difference_are_the_fewest_with_power() -> None:
    number = count_seeds_for_difference(1.0, 5)
    assert number is not None
    assert st.t_power(1.0, number, 0.01) >= 0.8 > st.t_power(1.0, number - 1, 0.01)
    # One test at 0.05 for an effect of one SD: ten pairs in every textbook.
    assert count_seeds_for_difference(1.0, 1) == 10
    assert count_seeds_for_difference(-1.0, 1) == 10
    assert count_seeds_for_difference(100.0, 1) == st.MIN_SEEDS
    assert count_seeds_for_difference(0.1, 1) is None
    assert count_seeds_for_difference(0.0, 1) is None


def test_the_power_of_an_equivalence_test_is_that_of_a_simulation() -> None:
    difference_RS = np.random.default_rng(0).standard_normal((100_000, 6))
    mean_R, error_R = difference_RS.mean(1), difference_RS.std(1, ddof=1) / 6**0.5
    shown = (stats.t.sf((1.5 - np.abs(mean_R)) / error_R, 5) <= 0.025).mean()
    assert compute_equivalence_power(1.5, 6, 0.025) == pytest.approx(shown, abs=0.005)


def test_seeds_for_equivalence() -> None:
    assert count_seeds_for_equivalence(10.0, 1) == st.EQUIVALENCE_SEEDS
    assert count_seeds_for_equivalence(0.1, 1) is None
    number = count_seeds_for_equivalence(1.0, 3)
    assert number is not None
    assert (
        compute_equivalence_power(1.0, number, 0.05 / 3) >= 0.8 > compute_equivalence_power(1.0, number - 1, 0.05 / 3)
    )


def test_the_sd_that_a_longer_run_would_need() -> None:
    needed = compute_needed_seeds(0.001, 0.05, 0.002, num_seeds=5, num_comparisons=2)
    assert needed.is_beyond_seeds
    # At this SD five seeds have power 0.8 for the observed difference.
    assert st.t_power(0.001 / needed.sd_for_observed, 5, 0.025) == pytest.approx(0.8, abs=1e-4)


def test_pairing_of_values_with_known_variances() -> None:
    # Var arm = 1, Var baseline = 1, correlation .5 exactly: Var difference = 1, so the ratio is 2.
    arm, other = [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]
    half = (3**0.5 / 2) / 3**0.5  # `other` has variance 3
    baseline = [0.5 * a + half * b for a, b in zip(arm, other, strict=True)]
    gains, together = measure_pairing(
        {"switch": (arm, baseline), "same": (arm, arm), "short": ([1.0, 2.0], [2.0, 1.0])}
    )
    assert list(gains) == ["switch"]  # the other ones have no spread, or too few seeds
    assert gains["switch"].correlation == pytest.approx(0.5)
    assert gains["switch"].variance_ratio == pytest.approx(2.0)
    assert together == pytest.approx(2.0)


def test_the_pooled_ratio_is_of_sums() -> None:
    first, second = ([0.0, 2.0, 4.0], [0.0, 0.0, 1.5]), ([0.0, 10.0, 0.0], [1.0, 0.0, 1.0])
    _, together = measure_pairing({"a": first, "b": second})
    variances = [np.var(side, ddof=1) for pair in (first, second) for side in pair]
    paired = [np.var(np.subtract(*pair), ddof=1) for pair in (first, second)]
    assert together == pytest.approx(sum(variances) / sum(paired))


def test_an_arm_that_does_not_vary_has_no_correlation() -> None:
    gains, _ = measure_pairing({"constant": ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])})
    assert gains["constant"].correlation is None
    assert gains["constant"].variance_ratio == pytest.approx(1.0)


def undecided_results() -> list:
    """Return results of an arm that is far from being decided: its differences change the sign."""
    moves = (0.08, -0.06, 0.07, -0.08, 0.0)
    results = [make_result("dense", seed, value) for seed, value in enumerate(DENSE)]
    return results + [make_result("switch", seed, DENSE[seed] + move) for seed, move in enumerate(moves)]


def test_a_comparison_says_what_would_settle_an_undecided_arm() -> None:
    results = undecided_results()
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert comparison.differences[0].verdict == "undecided"
    values = json.loads(json.dumps(comparison.to_dict()))["design"]
    needed = values["needed_seeds"]["switch"]
    assert needed["if_as_observed"] is None
    assert needed["if_equal"] == count_seeds_for_equivalence(round(0.02 / values["paired_sd"], 6), 1)
    assert 0.5 < values["pairing"]["arms"]["switch"]["variance_ratio"] < 2
    text = build_report(comparison).to_markdown()
    assert "Seeds that would settle undecided arms" in text
    assert f"> {MAX_SEEDS}" in text


def test_a_decided_arm_needs_no_seeds() -> None:
    results = with_own_jitter(make_results({"dense": 0, "switch": -0.1}))
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert comparison.differences[0].verdict == "better"
    assert comparison.to_dict()["design"]["needed_seeds"] == {}


EXPERIMENT = {
    "question": "Enough?",
    "base": {"task": {"name": "clustered"}, "train": {"steps": 2, "warmup_steps": 1}},
    "grid": {"router": ["dense", "switch", "top_k"]},
}


def write_experiment(folder: Path, name: str, **changes: object) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(EXPERIMENT | changes))
    return file


def test_power_before_any_result(tmp_path: Path) -> None:
    planned = plan_power(expand(write_experiment(tmp_path, "new")), tmp_path / "results", 0.01)
    rows = {row.num_seeds: row for row in planned.rows}
    assert [number for number, row in rows.items() if row.is_planned] == [5]
    assert rows[5].num_runs == 15
    assert rows[5].detectable_sds == pytest.approx(st.smallest_detectable(1.0, 5, 2))
    assert (planned.spread, rows[5].detectable, planned.seeds_for_margin) == (None, None, None)
    json.dumps(planned.to_dict())


def test_power_from_an_earlier_experiment_of_the_same_shape(tmp_path: Path) -> None:
    results = tmp_path / "results"
    earlier = expand(write_experiment(tmp_path, "earlier"))
    (results / "experiments").mkdir(parents=True)
    values = {
        "dense": (1.0, 1.1, 0.9, 1.0, 1.05),
        "switch": (1.1, 1.0, 1.0, 1.1, 1.0),
        "top_k": (0.9, 1.0, 1.1, 1.0, 1.0),
    }
    for cell in earlier.cells:
        folder = RunFolder.of(results, cell.id)
        folder.path.mkdir(parents=True)
        stored = cell.to_dict("earlier")
        folder.write_cell(stored)
        metrics = {"mse": values[cell.arm][cell.seed]}
        folder.write_result(make_result(cell.arm, cell.seed, 0.0, id=cell.id, metrics=metrics, config=stored["config"]))
    cells = [{"id": cell.id, "arm": cell.arm, "seed": cell.seed} for cell in earlier.cells]
    record = {"name": "earlier", "cells": cells, "baseline": "dense", "time": 1.0}
    (results / "experiments" / "earlier.json").write_text(json.dumps(record))
    spread = st.estimate_pooled_spread([values["switch"], values["top_k"]], values["dense"])
    assert spread is not None

    # Another grid of the same task, model and length knows the spread; a longer one does not.
    same = expand(write_experiment(tmp_path, "same", grid={"router": ["dense", "hash_position"]}))
    planned = plan_power(same, results, 0.01)
    assert planned.spread is not None
    assert (planned.spread.source, planned.spread.sd) == ("earlier", pytest.approx(spread.sd))
    row = next(row for row in planned.rows if row.is_planned)
    assert row.detectable == pytest.approx(st.smallest_detectable(spread.sd, 5, 1, spread.df))
    longer = expand(write_experiment(tmp_path, "longer", base={**EXPERIMENT["base"], "train": {"steps": 9}}))
    assert plan_power(longer, results, 0.01).spread is None
