"""The last lines of `moebench run`: what was done, what the tracker has missed, and the command that follows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moebench.cli.options import CommandArguments
from moebench.cli.run_summary import print_summary
from moebench.experiment.run_setup import RunOptions
from moebench.tracking.tracker import format_tracker_problem

PLUGINS = [f"/home/researcher/projects/routing/routers/variant_{number}.py" for number in range(8)]


def summarise(capsys: pytest.CaptureFixture[str], plugins: list[str] | None = None, **changes: Any) -> list[str]:
    """Return the lines of a run of two cells, both of them done unless `changes` says otherwise."""
    report: dict[str, Any] = {"num_done": 2, "num_cells": 2, "trained": [], "failed": [], "problems": []}
    report |= {"stages": None, "tuning": None, "below_trivial": "", "tracker_problem": None, "interrupted": 0}
    arguments = CommandArguments(experiment="tiny.yaml", plugins=plugins or [], results=Path("results"))
    report_of_run: Any = SimpleNamespace(**report | changes)
    print_summary(report_of_run, arguments, RunOptions(), lines=[], given=[], console=Console(width=40))
    return capsys.readouterr().out.splitlines()


def test_what_follows_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise(capsys, ["mine.py"]) == [
        "2 of 2 cells done, 0 of them trained now",
        "next: moebench compare tiny.yaml --plugin mine.py  |  moebench ui",
    ]


def test_nothing_is_compared_where_no_cell_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise(capsys, num_done=0) == ["0 of 2 cells done, 0 of them trained now"]


def test_many_plugins_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise(capsys, PLUGINS)[-1] == "next: `moebench compare` with the same arguments  |  moebench ui"
    assert summarise(capsys, PLUGINS, interrupted=2)[-1] == "interrupted; continue with: the same command"
    assert summarise(capsys, interrupted=2)[-1] == "interrupted; continue with: moebench run tiny.yaml"


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("tracker sqlite:///a.db cannot be used", "tracker sqlite:///a.db cannot be used"),
        ("the tracker process ended early, see log", "the tracker process ended early, see log"),
        ("2 runs were not sent", "tracker: 2 runs were not sent"),
    ],
)
def test_a_problem_names_the_tracker_once(capsys: pytest.CaptureFixture[str], problem: str, line: str) -> None:
    assert format_tracker_problem(problem) == line
    assert line in summarise(capsys, tracker_problem=problem)
