"""A cell that fails is reported with its reason; the others are trained, and the next call trains it again."""

import json
import math
import re
from pathlib import Path

import torch
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results, journal
from support.training_cases import read_checkpoint

FAULTY = """
import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Faulty(Switch):
    '''Switch, with a fault in its sixth step unless the file `repaired` exists.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "faulty"
        fault: str = "raise"
        '''raise, exit, die or nan.'''

    def forward(self, x_TD, ctx):
        routing = super().forward(x_TD, ctx)
        if not ctx.training or ctx.step != 5 or Path("repaired").exists():
            return routing
        if self.config.fault == "raise":
            raise RuntimeError("the router failed\\nin two lines")
        if self.config.fault == "exit":
            raise SystemExit(3)
        if self.config.fault == "die":
            os.kill(os.getpid(), 11)
        return replace(routing, weight_N=routing.weight_N * float("nan"))
"""
ARMS = ("raise", "exit", "die", "nan")
GRID = {"router": ["dense", *({"name": "faulty", "fault": fault, "label": fault} for fault in ARMS)]}
RUN = ("run", "./tiny.yaml", "--tracker", "none", "--plugin", "faulty.py", "--json")


def test_every_fault_is_reported_and_the_next_call_repairs(cli: CommandLine, warm: WarmCommandLine) -> None:
    cli.write(grid=GRID, seeds=[0], train={"checkpoint_every": 5})
    (cli.folder / "faulty.py").write_text(FAULTY)
    ended = warm(cli, *RUN)
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    assert results.statuses() == {("dense", 0): "done", **{(arm, 0): "failed" for arm in ARMS}}
    errors = {arm: results.result(arm, 0)["error"] for arm in ARMS}
    assert re.fullmatch(r"RuntimeError: the router failed in two lines \(.*faulty\.py:\d+\)", errors["raise"])
    assert re.fullmatch(r"SystemExit: 3 \(.*faulty\.py:\d+\)", errors["exit"])
    assert "SIGSEGV" in errors["die"]
    assert errors["nan"].startswith("loss is nan at step 6")
    faults = {arm: results.result(arm, 0)["fault"] for arm in ARMS}
    assert faults == {"raise": "own", "exit": "own", "die": "outside", "nan": "diverged"}
    reported = {cell["id"]: cell for cell in ended.json["failed"]}
    for arm, error in errors.items():
        folder = results.folder(arm, 0)
        assert reported[folder.name]["error"] == error
        assert Path(cli.folder / reported[folder.name]["log"]) == folder / "log.txt"
        assert results.result(arm, 0)["metrics"] == {}
    assert "in two lines" in (results.folder("raise", 0) / "log.txt").read_text()
    assert 'raise RuntimeError("the router failed' in (results.folder("raise", 0) / "log.txt").read_text()
    check_reports(cli, warm, errors)
    check_parameters_before_the_nan(results.folder("nan", 0))
    (cli.folder / "repaired").touch()
    again = warm(cli, *RUN)
    assert again.code == 0, again.err
    assert len(again.json["trained"]) == 4
    for arm in ARMS:
        result = results.result(arm, 0)
        assert (result["status"], result["step"], result["error"]) == ("done", 12, None)
        steps = [point["step"] for point in journal(results.folder(arm, 0)) if "loss/task" in point["metrics"]]
        assert steps == [*range(1, 13)]
    # The arms are one algorithm: all have the same result after being repaired and resumed.
    assert len({results.result(arm, 0)["metrics"]["bits_per_byte"] for arm in ARMS}) == 1


def check_reports(cli: CommandLine, warm: WarmCommandLine, errors: dict[str, str]) -> None:
    rows = {row["arm"]: row for row in warm(cli, "list", "runs", "--json").json}
    assert {arm: rows[arm]["error"] for arm in ARMS} == errors
    assert (rows["dense"]["state"], rows["nan"]["state"]) == ("done", "failed")
    assert "loss is nan" in warm(cli, "list", "runs").out
    compare = ("compare", "./tiny.yaml", "--plugin", "faulty.py")
    comparison = warm(cli, *compare, "--json").json
    assert {cell["arm"]: cell["reason"] for cell in comparison["failed"]} == errors
    for arm in ARMS:  # only divergence is an outcome of the algorithm
        has_diverged = arm == "nan"
        assert comparison["arms"][arm]["runs"] == {"done": 0, "failed": 1, "diverged": int(has_diverged), "missing": 0}
        assert (comparison["arms"][arm]["difference"]["verdict"] == "diverged") is has_diverged
    markdown = warm(cli, *compare, "--markdown").out
    assert all(f"FAILED {arm}, seed 0" in markdown for arm in ARMS)


def check_parameters_before_the_nan(folder: Path) -> None:
    """Check that the newest checkpoint is that of the step before, and finite; the journal has no nan step."""
    newest = max(folder.glob("checkpoints/step_*.ckpt"))
    assert newest.name == "step_0000005.ckpt"
    weights = read_checkpoint(newest)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert [point["step"] for point in journal(folder)][-1] == 5


def test_a_failed_result_has_the_last_step(cli: CommandLine, warm: WarmCommandLine) -> None:
    cli.write(grid={"router": [{"name": "faulty", "fault": "nan"}]}, seeds=[0], baseline="faulty")
    (cli.folder / "faulty.py").write_text(FAULTY)
    assert warm(cli, *RUN).code == 1
    assert Results(cli.folder / "results").result("faulty", 0)["step"] == 5


def test_divergence_is_detected_before_the_update(cli: CommandLine, warm: WarmCommandLine) -> None:
    cli.write(train={"learning_rate": 1e30, "checkpoint_every": 1}, seeds=[0])
    ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--json")
    assert ended.code == 1, ended.err
    results = Results(cli.folder / "results")
    assert set(results.statuses().values()) == {"failed"}
    for folder in results.folders():
        result = json.loads((folder / "result.json").read_text())
        assert "at step" in result["error"]
        assert "no update was made" in result["error"]
        for newest in folder.glob("checkpoints/step_*.ckpt"):
            weights = read_checkpoint(newest)["state_dict"]
            assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        assert all(math.isfinite(value) for point in journal(folder) for value in point["metrics"].values())


NAN_IN_EVALUATION = FAULTY.replace("not ctx.training or ctx.step != 5", "ctx.training").replace(
    'if self.config.fault == "raise"', 'if self.config.fault == "never"'
)


def test_a_final_evaluation_that_is_not_finite_fails_the_cell(cli: CommandLine, warm: WarmCommandLine) -> None:
    arms = ["dense", {"name": "faulty", "fault": "nan", "label": "nan"}]
    cli.write(grid={"router": arms}, seeds=[0])
    (cli.folder / "faulty.py").write_text(NAN_IN_EVALUATION)
    for _ in range(2):  # the second call evaluates the last checkpoint again
        ended = warm(cli, *RUN)
        assert ended.code == 1, ended.err
        (failed,) = ended.json["failed"]
        assert failed["error"].startswith("the validation split gives values that are not finite after step 12: ")
    results = Results(cli.folder / "results")
    assert results.result("nan", 0)["fault"] == "diverged"
    comparison = warm(cli, "compare", "./tiny.yaml", "--plugin", "faulty.py", "--json").json
    assert [cell["reason"] for cell in comparison["failed"]] == [failed["error"]]
