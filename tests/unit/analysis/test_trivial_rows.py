"""Trivial baselines in tables, JSON and the figure of a comparison."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.comparison_runs import list_cells, make_results

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.label_positions import spread_labels
from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.trivial_lines import draw_trivial_lines, draw_warning, include_reference
from moebench.analysis.compare.values import Comparison
from moebench.tasks.baselines.baseline import TrivialBaseline

MARK = "below trivial baselines: a ranking at this size says little"
SENTENCE = (
    "switch is better than dense, by less than the margin of ±0.0200 (1 %): −0.0100 bits per byte, 95 % interval"
    " [−0.0120, −0.0080] (paired over seeds 0-4, n = 5, p < 0.001, 1 comparison)."
)


def make_baselines(reference: float) -> tuple[TrivialBaseline, ...]:
    values = {"order-1 n-gram": 4.75, "order-3 n-gram": reference, "bz2 -9": 1.5}
    return tuple(
        TrivialBaseline(
            name=name,
            meaning="compressed" if name == "bz2 -9" else "counts",
            values={"bits_per_byte": value, "bits_per_byte/out_of_domain": value + 1},
            is_reference=name == "order-3 n-gram",
        )
        for name, value in values.items()
    )


def make_comparison(reference: float) -> Comparison:
    """Return a comparison whose baseline arm has the mean 2.0."""
    results = make_results({"dense": 0, "switch": -0.01})
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    return replace(comparison, trivial_baselines=make_baselines(reference))


def test_rows_stand_below_the_arms():
    table = build_report(make_comparison(2.5)).tables[0]
    assert [row[0] for row in table.rows] == ["dense", "switch (best)", "order-1 n-gram", "order-3 n-gram", "bz2 -9"]
    assert table.rows[3] == ("order-3 n-gram", "–", "2.5000", "+0.5000", "–", "trivial (reference)")
    assert table.rows[4] == ("bz2 -9", "–", "1.5000", "−0.5000", "–", "trivial")
    assert (table.notes, table.marked) == ((SENTENCE,), False)
    notes = build_report(make_comparison(2.5)).notes
    assert any("order-1 n-gram, order-3 n-gram: counts; bz2 -9: compressed." in note for note in notes)


def test_an_experiment_below_the_reference_is_marked():
    report = build_report(make_comparison(1.9))
    assert (report.tables[0].notes, report.tables[0].marked) == ((MARK, SENTENCE), True)
    assert f"- {MARK}" in report.to_markdown()
    assert report.values["below_trivial_baselines"] is True
    assert report.values["below_trivial_baselines_text"] == MARK
    entry = report.values["trivial_baselines"][1]
    assert (entry["name"], entry["values"]["bits_per_byte"], entry["is_reference"]) == ("order-3 n-gram", 1.9, True)
    json.dumps(report.values, allow_nan=False)


def test_an_experiment_above_the_reference_is_not_marked():
    values = build_report(make_comparison(2.5)).values
    assert (values["below_trivial_baselines"], values["below_trivial_baselines_text"]) == (False, None)


def test_where_higher_is_better_the_mark_turns():
    assert not replace(make_comparison(1.9), lower_is_better=False).is_below_trivial
    assert replace(make_comparison(2.5), lower_is_better=False).is_below_trivial


def test_without_baselines_nothing_is_said_but_a_problem():
    plain = replace(make_comparison(2.5), trivial_baselines=())
    assert build_report(plain).tables[0].notes == (SENTENCE,)
    assert build_report(plain).values["below_trivial_baselines"] is None
    problem = replace(plain, trivial_problem="task.data.path: 'x' does not exist")
    table = build_report(problem).tables[0]
    line = "no trivial baselines: task.data.path: 'x' does not exist"
    assert (table.notes, table.marked) == ((line, SENTENCE), False)


def test_out_of_domain_rows():
    results = [
        replace(result, metrics=result.metrics | {"bits_per_byte/out_of_domain": 3.0})
        for result in make_results({"dense": 0, "switch": -0.01})
    ]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    table = build_report(replace(comparison, trivial_baselines=make_baselines(2.5))).tables[1]
    assert table.rows[-2] == ("order-3 n-gram", "–", "3.5000", "+0.5000", "+1.0000")


@pytest.fixture
def ax():
    return Figure(figsize=(6, 4)).subplots()


def test_lines_inside_the_limits_have_names_and_others_are_listed(ax):
    ax.set_ylim(2, 5)
    text = draw_trivial_lines(ax, make_baselines(2.5), "bits_per_byte")
    assert [line.get_ydata()[0] for line in ax.lines] == [2.5, 4.75]
    assert [label.get_text() for label in ax.texts] == ["order-3 n-gram", "order-1 n-gram"]
    assert text == "thin lines: trivial baselines; outside: bz2 -9 1.5000"
    draw_warning(ax, MARK)
    assert ax.texts[-1].get_text() == MARK


def test_a_reference_that_no_arm_reaches_is_in_view():
    # the reference 1.9 is below all curves: 2.0 - 2.4, with a margin of 6 % of 0.5
    limits = include_reference((2.0, 2.4), make_baselines(1.9), "bits_per_byte", lower_is_better=True)
    assert limits == pytest.approx((1.87, 2.4))
    assert include_reference((2.0, 2.4), make_baselines(3.0), "bits_per_byte", lower_is_better=True) == (2.0, 2.4)
    assert include_reference((2.0, 2.4), (), "bits_per_byte", lower_is_better=True) == (2.0, 2.4)
    higher = include_reference((0.2, 0.4), make_baselines(0.6), "bits_per_byte", lower_is_better=False)
    assert higher == pytest.approx((0.2, 0.624))


def test_no_line_without_baselines(ax, tmp_path: Path):
    assert draw_trivial_lines(ax, (), "bits_per_byte") == ""
    assert spread_labels([], 0.1) == []
