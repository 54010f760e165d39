"""`moebench report`: the comparison of an experiment as one HTML file, and its tables as CSV and LaTeX."""

import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.compare import AllowMismatch, SplitName, SplitOption
from moebench.cli.options import (
    DEFAULT_RESULTS,
    CommandArguments,
    Json,
    Plugins,
    Results,
    Size,
    add_size,
    complete_experiment_or_router,
    print_json,
)
from moebench.cli.subjects import is_experiment
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.analysis.html_report.build import Page

SUFFIXES = (".html", ".htm")
Out = Annotated[
    Path | None, typer.Option(help="File to write. Default: experiments/NAME/report.html in the results folder.")
]
Tables = Annotated[Path | None, typer.Option(help="Also write each table to this folder, as NAME.csv and NAME.tex.")]


def report(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT | ROUTER...  [KEY=VALUE]...",
            help="An experiment, or the routers that `moebench compare` has compared.",
            autocompletion=complete_experiment_or_router,
        ),
    ],
    out: Out = None,
    tables: Tables = None,
    task: Annotated[str, typer.Option(help="If routers are given: the task to compare them on.")] = "language",
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    allow_mismatch: AllowMismatch = False,
    split: SplitOption = SplitName.TEST,
    json: Json = False,
) -> None:
    """Write the report of an experiment: verdicts, tables, curves, costs, expert loads, settings, provenance.

    One HTML file without scripts that loads nothing from the network. Works on a grid that is still running.
    """
    from moebench.analysis.html_report.build import Source, build_page
    from moebench.experiment.grid import expand, expand_routers
    from moebench.runs.experiment_summary import REPORT_FILE

    overrides = add_size([name for name in names if "=" in name], size)
    subjects = [name for name in names if "=" not in name]
    check_output_file(out)
    plugins = plugin or ()
    if is_one := is_experiment(subjects, "report", plugins):
        experiment = expand(find_experiment(subjects[0]), overrides, plugins, finished_in=results)
    else:
        experiment = expand_routers(subjects, task, overrides, plugins)
    rest = [*subjects[1:], *overrides]
    given = CommandArguments(experiment=subjects[0], overrides=rest, plugins=plugins, results=results)
    source = Source(
        experiment=experiment,
        results=results,
        split=split.value,
        allow_mismatch=allow_mismatch,
        command=given.format("run") if is_one else given.format("compare", "--task", task),
        made_at=time.strftime("%Y-%m-%d %H:%M"),
    )
    gc.freeze()  # collections need not look at the imported modules, as in `compare`
    page = build_page(source)
    file = out or results / "experiments" / experiment.name / REPORT_FILE
    write_files(page, file, tables, json=json)


def write_files(page: "Page", file: Path, tables: Path | None, *, json: bool) -> None:
    """Write the report, and its tables to a folder; print where they are, and the size of the report."""
    from moebench.reporting.table_files import write_tables
    from moebench.runs.folder import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, page.html)
    table_files = write_tables(page.tables, tables) if tables else []
    num_bytes = file.stat().st_size
    if json:
        print_json({"file": str(file), "bytes": num_bytes, "tables": [str(path) for path in table_files]})
        return
    print_text(f"{file} ({num_bytes / 1000:.0f} kB)")
    if table_files:
        print_text(f"{table_files[0].parent} ({len(table_files)} files of tables)")


def check_output_file(out: Path | None) -> None:
    """Raise UsageError for a file that cannot be written, before anything is computed."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: must be a file in a folder that exists")
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {out}: the report is HTML; allowed: a name that ends in {' or '.join(SUFFIXES)}")
