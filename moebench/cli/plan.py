"""`moebench plan`: the cells of an experiment before they are trained."""

from typing import TYPE_CHECKING, Any

from moebench.cli.options import (
    DEFAULT_RESULTS,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    print_json,
)
from moebench.experiment.files import find_experiment

if TYPE_CHECKING:
    from moebench.experiment.grid import Experiment


def plan(
    experiment: ExperimentName,
    overrides: Overrides = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Show every cell with its state, parameters and FLOPs per token, and train nothing.

    FLOPs are of one forward pass, 2 for a multiplication and an addition; training costs three times as much, and
    twice that for a router that is trained on two passes: "vs base" counts both. Where experts differ in size, FLOPs
    and active parameters are those of an even load. "memory" is the estimated peak of the cell in training, over its
    processes on one machine, or of one GPU; a cell that needs more than there is is refused by `run`.
    """
    from moebench.cli.output import print_progress
    from moebench.experiment.grid import expand
    from moebench.experiment.plan import plan_cells

    grid = expand(find_experiment(experiment), overrides or (), plugin or (), print_progress("arms checked"))
    rows = plan_cells(grid, results, print_progress("cells counted"))
    if json:
        print_json({"experiment": grid.name, "question": grid.question, "cells": rows})
        return
    _print(grid, rows)


def _print(grid: "Experiment", rows: list[dict[str, Any]]) -> None:
    from moebench.cli.output import make_console, print_table
    from moebench.reporting.formatting import MISSING, format_bytes, format_count

    console = make_console()
    console.print(f"{grid.name}: {grid.question}", highlight=False, markup=False)
    for note in grid.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"each cell trains on {format_count(rows[0]['train_tokens'])} tokens", highlight=False)
    numbers = ("active", "params", "FLOPs/token", "vs base", "memory")
    columns = ("cell", "arm", "seed", "state", *numbers)
    lines = [
        (
            row["id"] or MISSING,
            row["arm"] + "".join(f" ({mark})" for mark in row["marks"]),
            str(row["seed"]),
            row["state"],
            format_count(row["active_params"]),
            format_count(row["total_params"]),
            format_count(row["flops_per_token"]) + (f" × {row['train_passes']}" if row["train_passes"] > 1 else ""),
            _format_difference(row),
            format_bytes(row["memory_bytes"]),
        )
        for row in rows
    ]
    print_table(columns, lines, right=numbers, no_wrap=(columns[0], columns[2], *numbers))


def _format_difference(row: dict[str, Any]) -> str:
    """Return the difference to the baseline in the quantity that the layout matches: FLOPs or parameters."""
    if row["match"] == "params":
        return f"{row['params_vs_baseline']:+.2%} params"
    return f"{row['flops_vs_baseline']:+.2%}"
