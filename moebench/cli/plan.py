"""`moebench plan`: the cells of an experiment before they are trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.analysis.seed_planning.planned_power import PlannedPower
    from moebench.experiment.grid import Experiment

Power = Annotated[bool, typer.Option("--power", help="Show which differences the planned seeds can detect.")]
Margin = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="With --power: a difference of interest, as a share of the baseline's mean. Default: margin."
    ),
]


def plan(
    experiment: ExperimentName,
    overrides: Overrides = None,
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    power: Power = False,
    margin: Margin = None,
    json: Json = False,
) -> None:
    """Show every cell with its state, parameters, FLOPs per token and memory, without training.

    FLOPs are those of one forward pass, 2 per multiply-add. "vs base" compares with the baseline and counts both
    passes of a router that is trained on two. If experts differ in size, FLOPs and active parameters are those of an
    even load. "memory" is the estimated peak of the cell in training, over its processes on one machine, or of one
    GPU; `run` refuses a cell that needs more than is available.

    The second table has the training of each arm: FLOPs of forward and backward passes, tokens per active parameter and
    per parameter, text that is read, the training text that this needs, and epochs over the training split. More epochs
    than train.max_epochs are refused, here and by `run`. The last line says how many validation and test documents were
    removed because they are also in the training text.

    With --power: the smallest difference that several numbers of seeds would detect in 4 of 5 repeats, in standard
    deviations (SD) of the paired differences. If the results folder has results of this experiment, or of one with the
    same task, model, steps and batch size, also in the unit of the metric, with the seeds that undecided arms need.
    """
    from moebench.cli.output import print_progress
    from moebench.experiment.data_need import require_epochs
    from moebench.experiment.grid import expand
    from moebench.experiment.model_costs import ModelCosts
    from moebench.experiment.plan import plan_cells
    from moebench.experiment.stage_runs import list_earlier_cells

    on_progress, overrides = print_progress("arms checked"), add_size(overrides, size)
    grid = expand(find_experiment(experiment), overrides, plugin or (), on_progress, results=results)
    if power:
        _show_power(grid, results, grid.margin if margin is None else margin, json=json)
        return
    rows = plan_cells(grid, results, print_progress("cells counted"))
    if json:
        print_json({"experiment": grid.name, "question": grid.question, "cells": rows})
    else:
        _print_heading(grid)
        print_costs(rows)
        print_disk(rows)
        print_training(rows)
        print_overlap(rows)
    require_epochs([*list_earlier_cells(grid), *grid.cells], ModelCosts(results))


def _show_power(grid: "Experiment", results: Path, margin: float, *, json: bool) -> None:
    """Print what the planned seeds can show."""
    from moebench.analysis.compare.design_report import build_seeds_table
    from moebench.analysis.seed_planning.planned_power import plan_power
    from moebench.cli.output import make_console, print_table

    planned = plan_power(grid, results, margin)
    if json:
        print_json({"experiment": grid.name, "question": grid.question, "power": planned.to_dict()})
        return
    _print_heading(grid)
    columns = ("seeds", "runs", "detectable, in SD", f"in {planned.metric.replace('_', ' ')}")
    print_table(columns, _list_power_rows(planned), right=columns, no_wrap=columns)
    table = build_seeds_table(dict(planned.needed))
    if table.rows:
        print_table([column.header for column in table.columns], table.rows)
    for line in _explain_power(planned):
        make_console().print(line, highlight=False, markup=False)


def _list_power_rows(planned: "PlannedPower") -> list[tuple[str, ...]]:
    from moebench.reporting.formatting import MISSING, format_number

    return [
        (
            f"{row.num_seeds}{' (planned)' if row.is_planned else ''}",
            str(row.num_runs),
            f"{row.detectable_sds:.2f}",
            MISSING if row.detectable is None else format_number(row.detectable),
        )
        for row in planned.rows
    ]


def _explain_power(planned: "PlannedPower") -> list[str]:
    from moebench.analysis.design.power import MAX_SEEDS
    from moebench.reporting.formatting import format_number, format_plural

    comparisons = format_plural(planned.num_comparisons, "comparison")
    lines = [f"detectable: in 4 of 5 repeats, with p Holm for {comparisons}; SD: of the paired differences."]
    spread, share = planned.spread, f"{100 * planned.margin:.3g} %"
    if spread is None:
        lines.append(
            "The results folder has no results of this experiment or of one of its shape (task, model, steps, batch"
            " size) with three seeds: the SD is not known. Shorter runs would have another one."
        )
    else:
        number = planned.seeds_for_margin
        seeds = f"more than {MAX_SEEDS} seeds" if number is None else format_plural(number, "seed")
        lines.append(
            f"SD {format_number(spread.sd)}, from {spread.source}; {share} of the baseline's mean"
            f" {format_number(spread.mean)} takes {seeds}."
        )
    return lines + ([f"Verdicts will be at {planned.level.note}."] if planned.level.note else [])


def _print_heading(grid: "Experiment") -> None:
    from moebench.cli.output import make_console
    from moebench.experiment.trials import note_unequal_budgets

    console = make_console()
    console.print(f"{grid.name}: {grid.question}", highlight=False, markup=False)
    arms = grid.tuning.arms if grid.tuning else ()
    for note in (*grid.notes, *note_unequal_budgets({of_arm.arm: len(of_arm.trials) for of_arm in arms})):
        console.print(f"note: {note}", highlight=False, markup=False)


def print_costs(rows: list[dict[str, Any]]) -> None:
    """Print the state and the costs of each cell, as `plan_cells` returns them."""
    from moebench.cli.output import print_table
    from moebench.reporting.formatting import MISSING, format_bytes, format_count

    numbers = ("active", "params", "FLOPs/token", "vs base", "memory")
    stage = ("stage",) if any("stage" in row for row in rows) else ()
    columns = ("cell", *stage, "arm", "seed", "state", *numbers)
    lines = [
        (
            row["id"] or MISSING,
            *(row["stage"] for _ in stage),
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
    print_table(columns, lines, right=numbers, no_wrap=("cell", "seed", *numbers), keys=(*stage, "arm", "seed"))


def print_disk(rows: list[dict[str, Any]]) -> None:
    """Print how much the checkpoints of the cells that are not done will take."""
    from moebench.reporting.formatting import format_bytes

    sizes = [row["disk_bytes"] for row in rows if row["state"] != "done"]
    if sizes:
        print_text(f"Checkpoints on the disk when all is trained: {format_bytes(sum(sizes))} more.")


def print_training(rows: list[dict[str, Any]]) -> None:
    """Print what the training of each arm costs and reads, one row for equal arms and seeds."""
    from moebench.cli.output import print_table
    from moebench.reporting.formatting import MISSING, format_count

    def format_bytes_of(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        return MISSING if value is None else f"{format_count(value)}B"

    stage = ("stage",) if any("stage" in row for row in rows) else ()
    lines = {
        (row.get("stage"), row["arm"]): (
            *(row["stage"] for _ in stage),
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
    numbers = ("train FLOPs", "tokens", "/active", "/params", "text read", "needed", "epochs")
    print_table((*stage, "arm", *numbers), lines.values(), right=numbers, no_wrap=numbers, keys=(*stage, "arm"))


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
    from moebench.reporting.formatting import format_signed

    if row["match"] == "params":
        return f"{format_signed(100 * row['params_vs_baseline'], 2)}% params"
    return f"{format_signed(100 * row['flops_vs_baseline'], 2)}%"
