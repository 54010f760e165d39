"""`run --dry-run`, and cells whose result is damaged."""

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

from moebench.experiment.grid import expand
from moebench.experiment.store import split_unfinished


@pytest.fixture
def grid(cli: CommandLine) -> CommandLine:
    cli.write(seeds=[0])
    return cli


def test_a_dry_run_shows_the_states_and_writes_nothing(grid: CommandLine, warm: WarmCommandLine) -> None:
    before = sorted(grid.folder.rglob("*"))
    shown = warm(grid, "run", "./tiny.yaml", "--dry-run")
    assert shown.code == 0, shown.err
    assert "would train 3 of 3 cells (3 new); nothing was written" in shown.out
    rows = warm(grid, "run", "./tiny.yaml", "--dry-run", "--json").json["cells"]
    assert [(row["arm"], row["state"], row["action"], row["from_step"]) for row in rows] == [
        ("dense", "new", "train", 0),
        ("switch", "new", "train", 0),
        ("top_k", "new", "train", 0),
    ]
    folder = grid.folder / "results" / "runs" / rows[0]["id"]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step_0000008.json").write_text("{}")
    resumed = warm(grid, "run", "./tiny.yaml", "--dry-run", "--json").json["cells"][0]
    assert (resumed["state"], resumed["action"], resumed["from_step"]) == ("resumable", "resume", 8)
    created = {path for path in grid.folder.rglob("*") if path not in before}
    assert {path.relative_to(grid.folder).parts[0] for path in created} <= {"results"}
    assert not (grid.folder / "results" / "cache").exists()


def test_a_dry_run_refuses_what_a_run_would_refuse(grid: CommandLine, warm: WarmCommandLine) -> None:
    refused = warm(grid, "run", "./tiny.yaml", "--dry-run", "parallel.data=2", "parallel.nodes=2")
    assert refused.code == 2
    assert refused.err.startswith("error: parallel.nodes=2")
    both = warm(grid, "run", "./tiny.yaml", "--dry-run", "--foreground", "switch")
    assert (both.code, both.err.split(":")[1]) == (2, " --dry-run")


def test_a_damaged_result_fails_its_cell_alone(
    grid: CommandLine, warm: WarmCommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(grid.folder)
    experiment = expand(Path("tiny.yaml"))
    folder = grid.folder / "results" / "runs" / experiment.cells[1].id
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    unfinished, damaged = split_unfinished(grid.folder / "results", experiment)
    assert [cell.arm for cell in unfinished] == ["dense", "top_k"]
    assert [(outcome.cell.arm, outcome.status) for outcome in damaged] == [("switch", "failed")]
    ended = warm.train(grid, "--json")
    assert ended.code == 1, ended.err
    assert len(ended.json["trained"]) == 2
    assert [cell["state"] for cell in ended.json["cells"]] == ["done", "damaged", "done"]
    assert "delete it to run the cell again" in ended.json["failed"][0]["error"]
    assert (folder / "result.json").read_text() == "{"
    assert json.loads((Results(grid.folder / "results").folders()[0] / "result.json").read_text())["status"] == "done"
