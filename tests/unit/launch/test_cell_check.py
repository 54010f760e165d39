"""A cell is trained only with the plugins and the data that its id was computed from."""

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.launch.cell_check import list_version_changes
from moebench.launch.folder_training import TrainingReports, train_from_folder
from moebench.parallel.process_info import SINGLE_PROCESS
from moebench.runs.environment import describe_version
from moebench.runs.folder import RunFolder

PLUGIN = """
from dataclasses import dataclass
from constants import SCALE
from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch

@ROUTERS.register(Facts(
    family="token choice", equation="y = x", paper="none",
    causality=Causality(causal=True, reason="as switch", batch_dependent=False),
))
class NAME(Switch):
    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        name: str = "NAME"
"""


@pytest.fixture
def folder(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(cli.folder)
    return cli.folder


def train(experiment: Experiment, results: Path, version: str | None = None) -> RunFolder:
    cell = experiment.cells[-1]
    folder = RunFolder.of(results, cell.id)
    folder.write_cell(cell.to_dict("tiny") | ({"version": version} if version else {}))
    train_from_folder(folder, results, SINGLE_PROCESS, TrainingReports(progress=print, should_stop=lambda: False))
    return folder


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("edited", ["plugin", "module"])
def test_an_edited_plugin_is_not_trained(folder: Path, monkeypatch: pytest.MonkeyPatch, edited: str) -> None:
    monkeypatch.syspath_prepend(folder)
    name = f"edited_{edited}"
    plugin = folder / f"{name}.py"
    (folder / f"constants_{edited}.py").write_text("SCALE = 1\n")
    plugin.write_text(PLUGIN.replace("NAME", name).replace("from constants", f"from constants_{edited}"))
    experiment = expand(Path("tiny.yaml"), [f"grid.router=[dense,{name}]"], [str(plugin)])
    if edited == "plugin":
        plugin.write_text(plugin.read_text().replace("y = x", "y = 2 x").replace(name, f"{name}_2"))
    else:
        (folder / f"constants_{edited}.py").write_text("SCALE = 2\n")
    with pytest.raises(UsageError, match=rf"plugin .*{name}.py: was edited after this run was planned"):
        train(experiment, folder / "results")
    assert not (folder / "results" / "runs" / experiment.cells[-1].id / "journal.jsonl").exists()


def test_changed_data_is_not_trained_on(folder: Path) -> None:
    experiment = expand(Path("tiny.yaml"))
    file = folder / "text" / "a" / "document0.txt"
    file.write_text(file.read_text()[:-1] + "#")
    with pytest.raises(UsageError, match="task language: its data was changed after this run was planned"):
        train(experiment, folder / "results")


def test_another_version_of_moebench_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(expand(Path("tiny.yaml")), folder / "results", version="0.0 (abc)")
    assert f"the runner is moebench 0.0 (abc), this process {describe_version()}" in capsys.readouterr().out
    result = run.read_result()
    assert result is not None
    assert result.version == describe_version()
    environment = json.loads(run.environment.read_text())
    assert environment["version"] == describe_version()
    run.environment.write_text(json.dumps(environment | {"version": "0.1 (def)"}))
    (note,) = list_version_changes(run, {"version": describe_version()})
    assert note == f"steps up to 12 are by moebench 0.1 (def), later ones by {describe_version()}"
