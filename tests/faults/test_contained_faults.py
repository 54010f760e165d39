"""Nothing that displays, draws, tracks, reads journals or tidies up can end a run or change another cell."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine
from support.fault_injection import full_name, raise_in, record_side_calls
from support.results_folder import Results, deterministic_points

import moebench
from moebench.experiment.live_tracking import start_tracker
from moebench.experiment.runner import RunReport

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BROKEN = """
from dataclasses import dataclass

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Broken(Switch):
    '''Switch that raises in its fourth step.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "broken"

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step == 3:
            raise ValueError("as planned")
        return super().forward(x_TD, ctx)
"""
GRID = {
    "train": {"steps": 6, "checkpoint_every": 3, "eval_every": 3},
    "grid": {"router": ["switch", "broken", "top_k"]},
    "seeds": [0],
    "baseline": "switch",
}
ESSENTIAL = ("api", "config", "conversion", "process_setup", "experiment.plan", "experiment.runner", "interrupts")
ESSENTIAL += ("experiment.grid", "launch", "registry", "schema")
ESSENTIAL += ("runs.cell", "runs.folder", "runs.result", "tracking.tracker.TrackerStatus", "cores", "tasks")
ESSENTIAL += ("runs.folder_identity", "runs.checked_json", "file_access", "experiment.memory", "experiment.model_costs")
ESSENTIAL += ("experiment.display.open_display", "experiment.display._close", "reporting.streams")
ESSENTIAL += ("experiment.live_tracking", "experiment.phases", "experiment.run_setup")
"""Modules of the runner without which no cell can be trained; everything else that it calls may fail."""
SIDE = ("launch.launcher.LocalLauncher.release", "launch.failure.build_failed_result")
"""Functions of these modules that may fail as well."""
EXPECTED = ("Figures.draw_run_figures", "Figures.draw_experiment_figures", "LineDisplay.on_start", "Tracker.stop")
EXPECTED += ("LineDisplay.on_end", "Tracker.start", "Tracker.poll", "read_last_step", "LocalLauncher.release")
"""Calls that the search must find, among others."""


def is_side(name: str) -> bool:
    name = name.removeprefix("moebench.")
    is_essential = any(name == module or name.startswith(f"{module}.") for module in ESSENTIAL)
    return name in SIDE or not is_essential


class Runs:
    """Trains the grid by the API in this process, so that calls of the runner can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.cli = CommandLine(folder)
        self.cli.write(**GRID)
        (folder / "broken.py").write_text(BROKEN)
        os.chdir(folder)
        self.experiment = moebench.load_experiment("./tiny.yaml", plugins=["broken.py"])

    def train(self, results: str, tracker: str = "none") -> RunReport:
        return moebench.run(self.experiment, results, jobs=1, tracker=tracker)

    def assert_cells_equal(self, report: RunReport, results: str, reference: str) -> None:
        """Check that the broken cell alone has failed, and that the others have the numbers of the reference."""
        assert [(outcome.cell.arm, str(outcome.error).split(" (")[0]) for outcome in report.failed] == [
            ("broken", "ValueError: as planned")
        ]
        for arm in ("switch", "top_k"):
            folder, twin = (Results(Path(name)).folder(arm, 0) for name in (results, reference))
            result, expected = (Results(Path(name)).result(arm, 0) for name in (results, reference))
            assert (result["status"], result["metrics"]) == ("done", expected["metrics"])
            assert deterministic_points(folder) == deterministic_points(twin)
            assert (folder / "load.jsonl").read_text() == (twin / "load.jsonl").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = Path.cwd()
    grid_runs = Runs(tmp_path_factory.mktemp("contained"))
    yield grid_runs
    os.chdir(before)
    grid_runs.cli.kill_leftovers()


@pytest.fixture(scope="module")
def side_calls(runs: Runs) -> list[Any]:
    uri = f"sqlite:///{Path.cwd()}/mlflow.db"
    return record_side_calls(lambda: runs.train("reference", tracker=uri), start_tracker, is_side)


def test_the_search_finds_the_calls(side_calls: list[Any]) -> None:
    names = [full_name(function) for function in side_calls]
    assert not [end for end in EXPECTED if not any(name.endswith(end) for name in names)], names


def test_each_call_may_fail(runs: Runs, side_calls: list[Any]) -> None:
    for number, function in enumerate(side_calls):
        needs_tracker = "tracking" in function.__module__
        with raise_in([function]):
            report = runs.train(f"one{number}", tracker=f"sqlite:///{Path.cwd()}/one.db" if needs_tracker else "none")
        runs.assert_cells_equal(report, f"one{number}", "reference")


def test_all_calls_may_fail_at_once(runs: Runs, side_calls: list[Any]) -> None:
    with raise_in(side_calls):
        report = runs.train("all", tracker=f"sqlite:///{Path.cwd()}/all.db")
    runs.assert_cells_equal(report, "all", "reference")
    assert report.tracker_problem is not None  # exit code 3: it is not known what was sent
    named = " ".join(report.problems)
    assert all(action in named for action in ("display", "figures of switch, seed 0", "tracker", "release of devices"))
