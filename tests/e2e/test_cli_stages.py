"""`moebench run` of an experiment with stages: parents first, children from their weights, failures, kills, seeds."""

import json
import signal
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine, wait_until
from support.results_folder import Results

STAGES: list[dict[str, Any]] = [
    {"name": "train", "base": {"task": {"data": {"held_out_domains": ["b"]}}}},
    {
        "name": "adapt",
        "base": {"task": {"data": {"held_out_domains": ["a"]}}, "train": {"steps": 4, "warmup_steps": 1}},
    },
]


@pytest.fixture
def staged(cli: CommandLine) -> CommandLine:
    cli.write(stages=STAGES, grid={"router": ["dense", "switch"]}, seeds=[0])
    return cli


def read_cells(results: Results, experiment: str) -> dict[str, Any]:
    """Return arm -> id and result of the runs of a recorded experiment."""
    record = json.loads((results.path / "experiments" / f"{experiment}.json").read_text())
    return {
        cell["arm"]: json.loads((results.path / "runs" / cell["id"] / "result.json").read_text())
        for cell in record["cells"]
    }


def test_each_cell_is_trained_from_the_run_of_the_stage_before_it(staged: CommandLine, warm: WarmCommandLine) -> None:
    planned = warm(staged, "plan", "./tiny.yaml", "--json").json["cells"]
    assert [(row["stage"], row["arm"]) for row in planned] == [
        (stage, arm) for stage in ("train", "adapt") for arm in ("dense", "switch")
    ]
    run = warm.train(staged)
    assert run.code == 0, run.err
    assert "stage train: 2 runs that later ones start from" in run.err
    assert "2 of 2 cells done, 2 of them trained now" in run.err
    assert "earlier stages: 2 of 2 runs done" in run.err
    results = Results(staged.folder / "results")
    parents, children = read_cells(results, "tiny-train"), read_cells(results, "tiny")
    assert {row["id"] for row in planned} == {cell["id"] for cell in (*parents.values(), *children.values())}
    for arm, child in children.items():
        assert child["config"]["init"]["from"] == f"run:{parents[arm]['id']}"
        assert (results.path / "runs" / child["id"] / "init.json").exists()
    before = results.written_at()
    again = warm.train(staged, "--json")
    assert (again.code, again.json["trained"], again.json["stages"]) == (0, [], {"runs": 2, "done": 2, "trained": []})
    assert results.written_at() == before
    compared = warm(staged, "compare", "./tiny.yaml", "--json").json
    assert set(compared["arms"]) == {"dense", "switch"}
    removed = warm(staged, "rm", "tiny", "--yes")
    assert "kept: its runs of an earlier stage (moebench rm tiny-train)" in removed.out
    assert len(results.folders()) == 2
    assert warm(staged, "verify").code == 0


def test_children_of_a_failed_parent_fail_in_one_line_and_the_others_go_on(
    staged: CommandLine, warm: WarmCommandLine
) -> None:
    staged.write(stages=STAGES, grid={"train.learning_rate": [1e-2, 1e12]}, seeds=[0], baseline=None)
    run = warm.train(staged)
    assert run.code == 1
    results = Results(staged.folder / "results")
    parents, children = read_cells(results, "tiny-train"), read_cells(results, "tiny")
    assert [cell["status"] for cell in parents.values()] == ["done", "failed"]
    assert [cell["status"] for cell in children.values()] == ["done", "failed"]
    _, orphan = children.values()
    assert orphan["error"].startswith("init.from: learning_rate=1000000000000.0, seed 0 of stage train (run ")
    assert f"failed: learning_rate=1000000000000.0 seed 0 of stage adapt: {orphan['error']}" in run.err
    assert "failed: learning_rate=1000000000000.0 seed 0 of stage train: " in run.err
    assert "1 of 2 cells done" in run.err
    stopped = warm.train(staged, "--fail-fast")
    assert stopped.code == 1
    assert "note: stage train" in stopped.err


@pytest.mark.slow
def test_the_settings_of_the_last_stage_are_tuned(staged: CommandLine, warm: WarmCommandLine) -> None:
    tune = {"grid": {"train.learning_rate": [1e-2, 1e12]}, "seeds": [7]}
    staged.write(stages=STAGES, grid={"router": ["dense"]}, seeds=[0], tune=tune)
    run = warm.train(staged)
    assert run.code == 0, run.err
    results = Results(staged.folder / "results")
    record = json.loads((results.path / "experiments" / "tiny-train.json").read_text())
    assert sorted(cell["seed"] for cell in record["cells"]) == [0, 7]
    assert read_cells(results, "tiny")["dense"]["config"]["train"]["learning_rate"] == 0.01


@pytest.mark.slow
def test_runs_of_every_stage_resume_after_a_kill(staged: CommandLine, warm: WarmCommandLine) -> None:
    whole = warm.train(staged, results="whole")
    assert whole.code == 0
    for at in ("tiny-train", "tiny"):
        process = staged.start_training("--retries", "1")
        file = staged.folder / "results" / "experiments" / f"{at}.json"
        wait_until(lambda file=file: file.exists() and bool(staged.workers()), f"{at} did not start")
        process.send_signal(signal.SIGTERM)
        staged.wait(process)
    assert warm.train(staged).code == 0
    first, second = (read_cells(Results(staged.folder / name), "tiny") for name in ("whole", "results"))
    assert {arm: cell["metrics"] for arm, cell in first.items()} == {arm: c["metrics"] for arm, c in second.items()}


@pytest.mark.slow
def test_added_seeds_bring_their_parents(staged: CommandLine, warm: WarmCommandLine) -> None:
    staged.write(stages=STAGES, grid={"router": ["dense", "switch"]}, seeds=[0, 1, 2])
    run = warm.train(staged, "--until", "decided", "--max-seeds", "4", timeout=270)
    assert run.code == 0, run.err
    results = Results(staged.folder / "results")
    record = json.loads((results.path / "experiments" / "tiny.json").read_text())
    seeds = {cell["seed"] for cell in record["cells"]}
    cells = [json.loads((folder / "cell.json").read_text()) for folder in results.folders()]
    assert len(cells) == 2 * len(record["cells"])
    assert seeds in ({0, 1, 2}, {0, 1, 2, 3})
