"""Grids with several axes in `compare`: tables by axis, the panel of the figure."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from support.tuned_results import write_done

from moebench.analysis.compare.axis_figure import draw_axis_lines
from moebench.analysis.compare.experiment import compare_experiment
from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.values import Comparison
from moebench.experiment.grid import expand

MEANS = {"dense": 3.0, "num_experts=4": 2.9, "num_experts=16": 2.8}


def compare(tmp_path: Path, grid: dict[str, Any], num_seeds: int = 3) -> Comparison:
    """Return the comparison of a grid in which 16 experts are better than 4, and 4 better than none."""
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 200)
    base = {"task": {"sequence_length": 16, "data": {"path": str(text)}}}
    file = tmp_path / "axes.yaml"
    content = {"base": base, "grid": grid, "seeds": [*range(num_seeds)], "baseline": "dense"}
    file.write_text(json.dumps(content))
    experiment = expand(file)
    for cell in experiment.cells:
        mean = next(value for name, value in MEANS.items() if name in cell.arm)
        # The difference to dense varies by 0.001 a seed.
        write_done(tmp_path, cell, mean - 1 + cell.seed / 100 + (cell.seed / 1000 if cell.arm != "dense" else 0))
    return compare_experiment(experiment, tmp_path)


def tables_of(comparison: Comparison) -> dict[str, list[tuple[str, ...]]]:
    tables = [table for table in build_report(comparison).tables if table.title.startswith("By ")]
    return {table.title: [tuple(column.header for column in table.columns), *table.rows] for table in tables}


def test_rows_are_routers_and_columns_the_other_axis(tmp_path: Path) -> None:
    comparison = compare(tmp_path, {"router": ["dense", "switch", "hash"], "layout.num_experts": [4, 16]})
    tables = tables_of(comparison)
    assert list(tables) == [
        "By layout.num_experts: bits per byte on the test split",
        "By layout.num_experts: minus dense",
    ]
    means, differences = tables.values()
    assert means[0] == ("router", "num_experts=4", "num_experts=16")
    assert [row[0] for row in means[1:]] == ["dense", "switch", "hash"]
    assert means[1][1] == means[1][2] == "3.0100 ± 0.0248"  # dense is one arm
    assert [cell.split(" ")[0] for cell in means[2][1:]] == ["2.9110", "2.8110"]
    assert differences[1] == ("dense", "–", "–")
    assert [cell.split(" ")[0] for cell in differences[2][1:]] == ["−0.0990", "−0.1990"]
    assert differences[2][1].endswith(" better")
    axes = comparison.to_dict()["axes"]
    assert axes["dense"] == {"router": "dense"}
    assert axes["hash, num_experts=4"] == {"router": "hash", "layout.num_experts": "num_experts=4"}
    notes = [note for table in build_report(comparison).tables for note in table.notes]
    assert "dense: the same runs in every column" in notes


def test_a_third_axis_makes_tables_of_its_own(tmp_path: Path) -> None:
    grid = {"layout.num_experts": [4, 16], "router": ["dense", "switch"], "layout.depth": [1, 2]}
    tables = tables_of(compare(tmp_path, grid))
    assert [title.partition(": ")[2] for title in tables] == [
        "bits per byte on the test split, depth=1",
        "minus dense, depth=1",
        "bits per byte on the test split, depth=2",
        "minus dense, depth=2",
    ]
    for rows in tables.values():
        assert [row[0] for row in rows] == ["router", "dense", "switch"]
        assert rows[0][1:] == ("num_experts=4", "num_experts=16")


def test_a_grid_with_one_axis_has_no_such_table(tmp_path: Path) -> None:
    grid = {"router": ["dense", {"name": "switch", "label": "num_experts=4"}], "layout.num_experts": [4]}
    comparison = compare(tmp_path, grid)
    assert tables_of(comparison) == {}


def test_the_figure_has_a_line_for_each_router_over_the_axis(tmp_path: Path) -> None:
    comparison = compare(tmp_path, {"router": ["dense", "switch", "hash"], "layout.num_experts": [4, 16]})
    ax = Figure().subplots()
    draw_axis_lines(ax, comparison)
    assert ax.get_legend_handles_labels()[1] == ["dense", "switch", "hash"]
    assert ax.get_xlabel() == "layout.num_experts"
    assert ax.get_xscale() == "log"  # 16 is four times 4
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16"]
    lines = {str(line.get_label()): line for line in ax.lines}
    assert list(lines["dense"].get_ydata()) == [3.01, 3.01]  # horizontal
    switch = ax.containers[0].lines[0]  # type: ignore[attr-defined]
    assert [round(y, 3) for y in switch.get_ydata()] == [2.911, 2.811]
    assert list(switch.get_xdata()) == [4, 16]
