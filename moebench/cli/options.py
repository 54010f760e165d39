"""Arguments shared by several commands, and the completion of names, which imports nothing heavy."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moebench.commands import DEFAULT_RESULTS as DEFAULT_RESULTS
from moebench.commands import format_command, format_results
from moebench.errors import UsageError
from moebench.experiment.files import list_experiments
from moebench.file_access import require_utf8
from moebench.printable import format_json, print_text
from moebench.registry import names_without_import


def _completion(kind: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names_without_import(kind) if name.startswith(incomplete)]


def complete_experiment(incomplete: str) -> list[str]:
    """Complete the name of an experiment."""
    return [name for name in list_experiments() if name.startswith(incomplete)]


def complete_component(incomplete: str) -> list[str]:
    """Complete the name of a router, a layout or a task."""
    return [name for kind in ("router", "layout", "task") for name in _completion(kind)(incomplete)]


def complete_router(incomplete: str) -> list[str]:
    """Complete the name of a router."""
    return _completion("router")(incomplete)


def complete_experiment_or_router(incomplete: str) -> list[str]:
    """Complete the name of an experiment or a router."""
    return complete_experiment(incomplete) + complete_router(incomplete)


def _expand_home(path: Path) -> Path:
    """Return the path with the home folder for `~`, which the shell leaves in a variable and after `=`."""
    try:
        require_utf8(path, "results folder")
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(f"results folder {path}: unknown home folder ({error})") from error


Results = Annotated[
    Path,
    typer.Option(
        "--results",
        envvar="MOEBENCH_RESULTS",
        file_okay=False,
        callback=_expand_home,
        help="Folder of runs, tracker database and cache.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", help="Python file that registers a component (router, layout, ...). It is executed. Repeatable."
    ),
]
ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="An experiment file, or the name of an experiment (moebench list experiments).",
        autocompletion=complete_experiment,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the experiment, for example train.steps=500."),
]
Size = Annotated[
    str | None,
    typer.Option("--size", help="Named size in place of the experiment's own (list sizes); short for size=NAME."),
]
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class CommandArguments:
    """What a command was called with, for the commands that it recommends: they can be pasted into a shell."""

    experiment: str
    overrides: Sequence[str] = ()
    plugins: Sequence[str] = ()
    results: Path = DEFAULT_RESULTS

    def format(self, command: str, *options: str) -> str:
        """Return a command on the same experiment, quoted for the shell."""
        plugins = [part for plugin in self.plugins for part in ("--plugin", plugin)]
        parts = [*command.split(), self.experiment, *self.overrides, *plugins, *format_results(self.results), *options]
        return shlex.join(["moebench", *parts])

    def format_ui(self, tracker: str | None) -> str:
        """Return the command that shows a tracker; empty if there is none or it is a server, with its own UI."""
        if tracker and not tracker.startswith("sqlite"):
            return ""
        return format_command("ui", *(["--tracker", tracker] if tracker else []), results=self.results)


def add_size(overrides: Sequence[str] | None, size: str | None) -> list[str]:
    """Return the overrides with that of `--size`; raise UsageError where both choose a size."""
    given = list(overrides or ())
    if size is None:
        return given
    if any(override.startswith("size=") for override in given):
        raise UsageError(f"--size {size}: the size is given twice, also as an override (allowed: once)")
    return [*given, f"size={size}"]


def check_plot(plot: Path | None) -> None:
    """Raise UsageError for a figure file that cannot be written, before anything is computed."""
    if plot and (plot.is_dir() or not plot.parent.is_dir()):
        raise UsageError(f"--plot {plot}: must be a file in a folder that exists")
    if plot and plot.suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {plot}: the suffix chooses the format; allowed: {', '.join(PLOT_SUFFIXES)}")


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON on standard output."""
    try:
        print_text(format_json(value, indent))
    except BrokenPipeError:  # nobody reads it any more; the exit code still counts
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
