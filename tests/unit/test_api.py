"""The Python API: what importing it loads, and experiments run and read from Python."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine, WarmCommandLine, send, wait_for_step
from support.results_folder import Results

import moebench
from moebench import UsageError
from moebench.training.evaluation import evaluate

HEAVY = "torch numpy yaml lightning mlflow pandas statsmodels matplotlib datasets"


def test_importing_loads_only_what_is_used() -> None:
    """That building a layer loads little is in `test_architecture.py`, where a process does so."""
    code = f"import moebench; import sys; print(*[name for name in {HEAVY.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_package_lists_its_public_names() -> None:
    assert {*moebench.__all__} <= {*dir(moebench)}
    assert all(getattr(moebench, name) for name in moebench.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'moe_layers'"):
        _ = moebench.moe_layers


SCRIPT = """
import moebench
report = moebench.run(moebench.load_experiment("./tiny.yaml"), tracker="none", quiet=True)
assert (report.num_done, len(report.trained), report.failed) == (9, 1, []), report.failed
"""
"""Without `if __name__ == "__main__"`: workers do not import the script."""


@pytest.fixture(scope="session")
def trained(
    built_once: Callable[[str, Callable[[Path], Any]], Path], finished: CommandLine, warm: WarmCommandLine
) -> Path:
    """A folder with the tiny experiment, whose last missing cell was trained by `moebench.run` in a script."""

    def train(folder: Path) -> None:
        command_line = CommandLine(folder)
        shutil.copytree(finished.folder, folder, dirs_exist_ok=True)
        shutil.rmtree(Results(folder / "results").folder("switch", 1))
        (folder / "script.py").write_text(SCRIPT)
        done = warm.run_script(command_line, folder / "script.py")
        command_line.kill_leftovers()
        assert (done.code, done.err) == (0, ""), done.err

    return built_once("api_runs", train)


@pytest.fixture
def results(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained / "results"


def test_comparing_runs_by_id_equals_comparing_their_experiment(results: Path) -> None:
    of_experiment = moebench.compare("./tiny.yaml", results)
    of_runs = moebench.compare(moebench.load_runs(results)["id"], results)
    assert {arm.arm for arm in of_experiment.arms} == {"dense", "switch", "top_k"}
    assert of_runs.to_dict()["arms"] == of_experiment.to_dict()["arms"]
    text = moebench.to_text(of_experiment)
    assert text.startswith("Quality: bits per byte on the test split")
    assert all(len(line) <= 100 and line == line.rstrip() for line in text.splitlines())


def test_fairness_and_pooled_experiments_are_those_of_the_command_line(
    results: Path, finished: CommandLine, warm: WarmCommandLine
) -> None:
    compared = warm(finished, "compare", "./tiny.yaml", "--json").json["fairness"]
    fairness = json.loads(json.dumps(moebench.measure_fairness("./tiny.yaml", finished.folder / "results").to_dict()))
    assert fairness == compared
    experiment = moebench.load_experiment("./tiny.yaml")
    parts = [
        replace(experiment, name=name, cells=tuple(cell for cell in experiment.cells if cell.seed in seeds))
        for name, seeds in (("first", (0,)), ("others", (1, 2)))
    ]
    pooled = moebench.pool(parts, results)
    assert {*pooled.to_dict()["arms"]} == {"switch", "top_k"}
    assert moebench.to_text(pooled).startswith("Pooled over first, others: minus dense")
    with pytest.raises(UsageError, match="pool: got 1 experiments"):
        moebench.pool(parts[:1], results)


def test_another_baseline_and_split_can_be_chosen(results: Path) -> None:
    comparison = moebench.compare("./tiny.yaml", results, baseline="switch", split="validation")
    assert (comparison.baseline, comparison.split) == ("switch", "validation")
    runs = moebench.load_runs(results).query("arm != 'dense'")
    assert moebench.compare(runs["id"], results).baseline in ("switch", "top_k")


def test_a_table_of_runs_has_settings_and_results(results: Path) -> None:
    runs = moebench.load_runs(results)
    assert len(runs) == 9
    assert set(runs["status"]) == {"done"}
    assert set(runs["train.steps"]) == {12}
    assert set(runs["router.name"]) == {"dense", "switch", "top_k"}
    switch = runs[runs["arm"] == "switch"]
    assert set(switch["router.losses.load_balance"]) == {0.01}
    for column in ("test/bits_per_byte", "validation/bits_per_byte", "cost/flops_per_token", "throughput/tokens_per_s"):
        assert runs[column].notna().all()
    assert runs["test/load/cv"].notna().sum() == 6  # the dense arm has no experts
    assert moebench.load_runs(results / "nowhere").empty


def test_a_loaded_model_has_the_quality_of_its_run(results: Path) -> None:
    row = moebench.load_runs(results).query("arm == 'top_k' and seed == 1").iloc[0]
    model, task = moebench.load_model(row["id"][:8], results)
    assert not model.training
    batches = task.eval_batches("test", int(row["train.batch_size"]))
    metrics = evaluate(model, task, batches, seed=1, device="cpu").metrics
    assert metrics["bits_per_byte"] == row["test/bits_per_byte"]
    by_folder, _ = moebench.load_model(results / "runs" / row["id"])
    assert all(map(torch.equal, by_folder.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda results: moebench.load_experiment("quickstrat"), "experiment: 'quickstrat' is unknown"),
        (lambda results: moebench.load_experiment("./tiny.yaml", ["train.step=3"]), "Did you mean 'steps'"),
        (lambda results: moebench.compare([], results), "got no run"),
        (lambda results: moebench.compare("./tiny.yaml", results / "nowhere"), "no cell of 'tiny' has a result"),
        (lambda results: moebench.load_model("zz", results), "'zz' is unknown"),
    ],
)
def test_mistakes_about_runs_are_refused_in_one_line(results: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        call(results)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_interrupted_run_saves_a_checkpoint_and_raises(cli: CommandLine) -> None:
    grid = {"grid": {"router": ["switch"]}, "baseline": "switch", "seeds": [0]}
    cli.write(train={"steps": 3000, "checkpoint_every": 500, "eval_every": 1000}, **grid)
    script = "import moebench; moebench.run('./tiny.yaml', tracker='none', quiet=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=cli.folder, env=cli.environment, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(Results(cli.folder / "results"), 20)
    send(process, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    runs = moebench.load_runs(cli.folder / "results")
    assert runs["status"].tolist() == ["resumable"]
    cli.assert_no_process_is_left()


def test_a_folder_without_runs_gives_a_table_without_rows(tmp_path: Path) -> None:
    runs = moebench.load_runs(tmp_path)
    assert len(runs) == 0
    assert list(runs.columns) == ["id", "experiment", "arm", "seed", "status", "error"]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(moebench.UsageError, match="split: 'tset' is unknown"):
        moebench.compare(["a"], split="tset")
