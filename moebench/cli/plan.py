"""`moebench plan`: the cells of an experiment before they are trained."""

from typing import TYPE_CHECKING, Any

from moebench.cli.options import (
    DEFAULT_RESULTS,
    ExperimentName,
    Json,
    Overrides,
    Plugins,
    Results,
    Size,
    add_size,
    print_json,
)
from moebench.experiment.files import find_experiment

if TYPE_CHECKING:
    from moebench.experiment.grid import Experiment


def plan(
    experiment: ExperimentName,
    overrides: Overrides = None,
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Show every cell with its state, parameters and FLOPs per token, and train nothing.

    FLOPs are of one forward pass, 2 for a multiplication and an addition; training costs three times as much, and
    twice that for a router that is trained on two passes: "vs base" counts both. Where experts differ in size, FLOPs
    and active parameters are those of an even load. "memory" is the estimated peak of the cell in training, over its
    processes on one machine, or of one GPU; a cell that needs more than there is is refused by `run`.

    The second table has the training of each arm: FLOPs of forward and backward passes, tokens for each active and
    each parameter, text that is read, the training text that this needs, and epochs over the training split. More
    than train.max_epochs are refused, here and by `run`. The last line says how many validation and test documents were
    removed because the training text has them.
    """
    from moebench.cli.output import print_progress
    from moebench.experiment.data_need import require_epochs
    from moebench.experiment.grid import expand
    from moebench.experiment.model_costs import ModelCosts
    from moebench.experiment.plan import plan_cells

    grid = expand(find_experiment(experiment), add_size(overrides, size), plugin or (), print_progress("arms checked"))
    rows = plan_cells(grid, results, print_progress("cells counted"))
    if json:
        print_json({"experiment": grid.name, "question": grid.question, "cells": rows})
    else:
        _print_heading(grid)
        print_costs(rows)
        print_training(rows)
        print_overlap(rows)
    require_epochs(grid.cells, ModelCosts(results))


def _print_heading(grid: "Experiment") -> None:
    from moebench.cli.output import make_console

    console = make_console()
    console.print(f"{grid.name}: {grid.question}", highlight=False, markup=False)
    for note in grid.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def print_costs(rows: list[dict[str, Any]]) -> None:
    """Print the state and the costs of each cell, as `plan_cells` returns them."""
    from moebench.cli.output import print_table
    from moebench.reporting.formatting import MISSING, format_bytes, format_count

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
    print_table(columns, lines, right=numbers, no_wrap=(columns[0], columns[2], *numbers), keys=("arm", "seed"))


def print_training(rows: list[dict[str, Any]]) -> None:
    """Print what the training of each arm costs and reads, one row for arms and seeds that are alike."""
    from moebench.cli.output import print_table
    from moebench.reporting.formatting import MISSING, format_count

    def format_bytes_of(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        return MISSING if value is None else f"{format_count(value)}B"

    lines = {
        row["arm"]: (
            row["arm"],
            f"{row['train_flops']:.2e}",
            format_count(row["train_tokens"]),
            f"{row['tokens_per_active_param']:.1f}",
            f"{row['tokens_per_param']:.1f}",
            format_bytes_of(row, "read_bytes"),
            format_bytes_of(row, "needed_bytes"),
            MISSING if row["epochs"] is None else f"{row['epochs']:.2f}",
        )
        for row in rows
    }
    columns = ("arm", "train FLOPs", "tokens", "/active", "/params", "text read", "needed", "epochs")
    print_table(columns, lines.values(), right=columns[1:], no_wrap=columns[1:])


def print_overlap(rows: list[dict[str, Any]]) -> None:
    """Print how much of the evaluation text was removed because the training text has it, once for each source."""
    from moebench.cli.output import make_console
    from moebench.tasks.text.overlap import MOST_NAMED

    for overlap in {str(row["overlap"]): row["overlap"] for row in rows if row["overlap"]}.values():
        named = [f"{domain} {count}" for domain, count in overlap["removed_by_domain"].items()]
        domains = f" ({', '.join(named[:MOST_NAMED])}{', ...' if len(named) > MOST_NAMED else ''})" if named else ""
        make_console().print(
            f"overlap with the training text: {overlap['removed']:,} of {overlap['documents']:,} validation and test"
            f" documents removed{domains}",
            highlight=False,
            markup=False,
        )


def _format_difference(row: dict[str, Any]) -> str:
    """Return the difference to the baseline in the quantity that the layout matches: FLOPs or parameters."""
    if row["match"] == "params":
        return f"{row['params_vs_baseline']:+.2%} params"
    return f"{row['flops_vs_baseline']:+.2%}"
