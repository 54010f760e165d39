"""Processes that a plug-in starts: they end with the cell, also those that are detached from it."""

import json

import pytest
from support.command_line import CommandLine
from support.results_folder import Results

PLUGIN = """
import os
import subprocess
from dataclasses import dataclass

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Starts(Switch):
    '''Switch, which starts processes in its second step.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "starts"
        end: str = "done"

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step == 1:
            subprocess.Popen(["sleep", "600"], start_new_session=True)
            if os.fork() == 0:  # a daemon: its parent ends at once
                if os.fork() == 0:
                    os.execvp("sleep", ["sleep", "601"])
                os._exit(0)
            os.wait()
            if self.config.end == "crash":
                os.kill(os.getpid(), 9)
        return super().forward(x_TD, ctx)
"""


@pytest.mark.slow
def test_processes_of_a_plugin_end_with_its_cell(cli: CommandLine) -> None:
    ends = [{"name": "starts", "end": end, "label": end} for end in ("done", "crash")]
    cli.write(grid={"router": ["dense", *ends]}, baseline="dense", seeds=[0])
    (cli.folder / "starts.py").write_text(PLUGIN)
    ended = cli.train("--plugin", "starts.py", "--jobs", "1", "--json")
    assert not cli.processes(), [process.cmdline() for process in cli.processes()]
    assert "waitpid" not in ended.err
    assert ended.code == 1, ended.err
    assert Results(cli.folder / "results").statuses() == {
        ("dense", 0): "done",
        ("done", 0): "done",
        ("crash", 0): "failed",
    }
    assert len(json.loads(ended.out)["trained"]) == 2
