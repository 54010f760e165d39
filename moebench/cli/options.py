"""Arguments that several commands share, and the completion of names, which imports nothing heavy."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from moebench.errors import UsageError, nearest
from moebench.registry import names_without_import

EXPERIMENTS = Path("experiments")
"""Where an experiment's name is looked up when it is not a path."""


def _completion(kind: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names_without_import(kind) if name.startswith(incomplete)]


def experiment_names() -> list[str]:
    """Return the names of the experiment files in the folder `experiments`."""
    return sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))


def complete_experiment(incomplete: str) -> list[str]:
    """Complete the name of an experiment."""
    return [name for name in experiment_names() if name.startswith(incomplete)]


def complete_component(incomplete: str) -> list[str]:
    """Complete the name of a router, a layout or a task."""
    return [name for kind in ("router", "layout", "task") for name in _completion(kind)(incomplete)]


def complete_router(incomplete: str) -> list[str]:
    """Complete the name of a router."""
    return _completion("router")(incomplete)


def complete_experiment_or_router(incomplete: str) -> list[str]:
    """Complete the name of an experiment or a router."""
    return complete_experiment(incomplete) + complete_router(incomplete)


Results = Annotated[
    Path,
    typer.Option(
        "--results", envvar="MOEBENCH_RESULTS", file_okay=False, help="Folder of runs, tracker database and cache."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Python file that registers a router, layout or task. It is executed. Repeatable."),
]
ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="An experiment file, or the name of one in experiments/.",
        autocompletion=complete_experiment,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the experiment, for example train.steps=500."),
]
DEFAULT_RESULTS = Path("results")


def find_experiment(name: str) -> Path:
    """Return the file of an experiment given by path or name; raise UsageError when there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if not path.is_file():
            raise UsageError(f"{name}: no such experiment file.{nearest(path.stem, experiment_names())}")
        return path
    file = EXPERIMENTS / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(experiment_names()) or "none in the folder experiments/ here"
        raise UsageError(f"experiment '{name}' is unknown.{nearest(name, experiment_names())} Allowed: {names}")
    return file
