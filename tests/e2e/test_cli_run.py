"""`moebench run` in real processes: its files, its output, and that the same cell gives the same bits."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from support.command_line import ROOT, CommandLine, WarmCommandLine
from support.results_folder import Results, deterministic_points, drop_measured, journal
from support.terminal import run_in_terminal
from support.tiny_experiment import ARMS

from moebench.experiment.grid import expand

RESULT_KEYS = {"id", "arm", "seed", "status", "error", "step", "metrics", "cost", "throughput", "data_digest"}
RESULT_KEYS |= {"eval_digest", "marks", "config"}
LOAD_KEYS = {
    f"load/{name}"
    for name in (
        "max_violation",
        "cv",
        "entropy",
        "dead_experts",
        "drop_rate",
        "reroute_rate",
        "unserved",
        "flops_per_token",
        "experts_per_token",
        "train_drop_rate",
        "train_unserved",
        "information/domain",
        "information/position",
        "information/token",
    )
}


def test_a_finished_run_reports_json_on_stdout_and_progress_on_stderr(finished: CommandLine) -> None:
    report = json.loads((finished.folder / "run.json").read_text())
    assert report["experiment"] == "tiny"
    assert [(cell["arm"], cell["seed"]) for cell in report["cells"]] == [(arm, s) for s in (0, 1, 2) for arm in ARMS]
    assert {cell["state"] for cell in report["cells"]} == {"done"}
    assert sorted(report["trained"]) == sorted(cell["id"] for cell in report["cells"])
    assert (report["failed"], report["tracker"], report["interrupted"]) == ([], None, 0)
    stderr = (finished.folder / "run.err").read_text()
    assert "\x1b" not in stderr  # a pipe gets plain lines
    starts = re.findall(r"^start    (\w+) · seed (\d)  [0-9a-f]{12}$", stderr, re.M)
    assert starts == [(arm, str(seed)) for seed in (0, 1, 2) for arm in ARMS]  # seeds outermost
    ends = re.findall(r"^done     (\w+) · seed (\d) +\d+\.\d{4} bits per byte  \(\d+ s\)  \[(\d)/9\]$", stderr, re.M)
    assert len(ends) == 9
    assert [number for _, _, number in ends] == [str(n) for n in range(1, 10)]


def test_the_files_of_a_run_folder(finished: CommandLine) -> None:
    results = Results(finished.folder / "results")
    assert len(results.folders()) == 9
    for folder in results.folders():
        cell = json.loads((folder / "cell.json").read_text())
        assert re.fullmatch("[0-9a-f]{12}", cell["id"])
        assert (cell["id"], cell["experiment"]) == (folder.name, "tiny")
        assert cell["varies"] == {"router.name": cell["arm"], "seed": cell["seed"]}
        assert cell["data"]["name"] == "language"
        result = json.loads((folder / "result.json").read_text())
        assert set(result) >= RESULT_KEYS
        assert [result[key] for key in ("id", "arm", "seed")] == [cell[key] for key in ("id", "arm", "seed")]
        assert (result["status"], result["error"], result["step"]) == ("done", None, 12)
        assert result["config"] == cell["config"]
        assert result["config"]["train"]["steps"] == 12
        check_numbers(result, dense=cell["arm"] == "dense")
        environment = json.loads((folder / "environment.json").read_text())
        assert {"python", "torch", "platform", "processor", "cores", "threads", "packages"} <= set(environment)
        assert {"git_commit", "git_dirty"} <= set(environment)
        assert (folder / "log.txt").exists()
        assert not [file for file in folder.rglob("*") if file.name.endswith(".tmp")]
    assert len({json.loads((f / "result.json").read_text())["eval_digest"] for f in results.folders()}) == 1


def check_numbers(result: dict, *, dense: bool) -> None:
    metrics, cost, speed = result["metrics"], result["cost"], result["throughput"]
    assert {"bits_per_byte", "bits_per_byte/a", "bits_per_byte/b"} <= set(metrics)
    assert all(math.isfinite(value) for value in [*metrics.values(), *cost.values(), *speed.values()])
    assert 0 < metrics["bits_per_byte"] < 9  # 8 bits per byte: a uniform guess
    assert {key for key in metrics if key.startswith("load/")} == (set() if dense else LOAD_KEYS)
    assert cost["train_tokens"] == 12 * 2 * 32  # steps · sequences · tokens
    assert 0 < cost["active_params"] <= cost["total_params"]
    assert cost["flops_per_token"] > 0
    assert all(speed[key] > 0 for key in ("tokens_per_s", "step_s", "train_s", "total_s"))
    assert 0 < speed["data_share"] < 1


def test_the_journal_has_every_step_once_with_the_documented_metrics(finished: CommandLine) -> None:
    for folder in Results(finished.folder / "results").folders():
        points = journal(folder)
        assert [p["step"] for p in points if "loss/task" in p["metrics"]] == [*range(1, 13)]
        assert [p["step"] for p in points if "eval/bits_per_byte" in p["metrics"]] == [6, 12]
        times = [point["time"] for point in points]
        assert times == sorted(times)
        arm = json.loads((folder / "cell.json").read_text())["arm"]
        names = {name for point in points for name in point["metrics"]}
        assert {
            "loss/total",
            "train/learning_rate",
            "train/grad_norm",
            "train/tokens_per_s",
            "time/data_share",
        } <= names
        assert {"eval/bits_per_byte/a", "eval/bits_per_byte/b"} <= names
        if arm == "dense":
            assert not [name for name in names if "load" in name]
            assert not (folder / "load.jsonl").exists()
            continue
        assert {"loss/load_balance", "balance/load_balance", "eval/load/max_violation"} <= names
        first = next(point["metrics"] for point in points if "loss/task" in point["metrics"])
        coefficient = json.loads((folder / "cell.json").read_text())["config"]["router"]["losses"]["load_balance"]
        assert math.isclose(first["loss/load_balance"], coefficient * first["balance/load_balance"], rel_tol=1e-5)
        loads = [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]
        assert [line["step"] for line in loads] == [6, 12]
        # n=2 of 2 blocks: block 1 has the 4 experts; all assignments are counted.
        per_token = 2 if arm == "top_k" else 1
        sums = {sum(load) for line in loads for load in line["layers"].values()}
        assert [list(line["layers"]) for line in loads] == [["1"], ["1"]]
        assert all(len(line["layers"]["1"]) == 4 for line in loads)
        assert sums == {2 * 4 * 32 * per_token}  # domains · windows · tokens


def test_the_record_of_the_experiment_names_its_cells(finished: CommandLine) -> None:
    record = json.loads((finished.folder / "results/experiments/tiny.json").read_text())
    assert (record["name"], record["question"], record["baseline"]) == ("tiny", "Does it run?", "dense")
    assert record["file"].endswith("tiny.yaml")
    assert {cell["id"] for cell in record["cells"]} == {
        folder.name for folder in Results(finished.folder / "results").folders()
    }


def test_the_figures_are_drawn(finished: CommandLine) -> None:
    results = finished.folder / "results"
    assert (results / "experiments/tiny/curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = {json.loads((file.parent / "cell.json").read_text())["arm"] for file in results.glob("runs/*/load.png")}
    assert drawn == {"switch", "top_k"}
    labels = {file.parent for file in results.glob("runs/*/labels.png")}
    assert labels == {file.parent for file in results.glob("runs/*/load.png")}
    assert all((folder / "labels.json").exists() for folder in labels)


def test_only_missing_cells_are_trained_and_equal_those_of_another_folder(
    cli: CommandLine, finished: CommandLine, warm: WarmCommandLine
) -> None:
    # Two cells are copied from the finished grid; the others are trained in this folder, with another --jobs.
    results, reference = Results(cli.folder / "results"), Results(finished.folder / "results")
    for arm in ("dense", "switch"):
        done = reference.folder(arm, 0)
        shutil.copytree(done, results.path / "runs" / done.name)
    before = results.written_at()
    first = warm.train(cli, "--jobs", "1")
    assert first.code == 0, first.err
    assert first.out == ""
    assert "6 of 6 cells done, 4 of them trained now" in first.err
    after = results.written_at()
    assert before.items() <= after.items()
    second = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--json")
    assert (second.code, second.json["trained"], second.json["failed"]) == (0, [], [])
    assert results.written_at() == after
    assert len(after) == 6
    for folder in results.folders():
        twin = reference.path / "runs" / folder.name
        result, expected = (json.loads((path / "result.json").read_text()) for path in (folder, twin))
        was_copied = str(folder / "result.json") in before
        assert (result["throughput"] == expected["throughput"]) is was_copied
        assert drop_measured(result) == drop_measured(expected)
        assert deterministic_points(folder) == deterministic_points(twin)
        if (folder / "load.jsonl").exists():
            assert (folder / "load.jsonl").read_text() == (twin / "load.jsonl").read_text()


def test_the_id_of_a_cell_depends_on_configuration_and_data_only(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path
) -> None:
    def states(*changes: str) -> set[str]:
        ended = warm(finished, "plan", "./tiny.yaml", "--json", *changes)
        assert ended.code == 0, ended.err
        return {cell["state"] for cell in ended.json["cells"]}

    text = tmp_path / "moved"
    shutil.copytree(finished.folder / "text", text)
    moved = f"task.data.path={text}"
    assert states() == {"done"}
    assert states("train.log_every=5", "train.checkpoint_every=7", moved) == {"done"}
    assert states("train.beta2=0.9") == {"new"}
    assert states("grid.router=[switch,dense,{name: top_k, top_k: 2, label: other}]") == {"done"}
    (text / "a/document0.txt").write_text("something else " * 200)
    assert states(moved) == {"new"}


def test_an_override_for_some_arms_is_noted(cli: CommandLine, warm: WarmCommandLine) -> None:
    changes = ("seeds=[0]", "router.jitter=0.0", "train.steps=2", "grid.router=[dense,switch]")
    ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none", *changes)
    assert ended.code == 0, ended.err
    assert "note: router.jitter applies to switch" in ended.err
    assert Results(cli.folder / "results").result("switch", 0)["config"]["router"]["jitter"] == 0.0


def test_a_terminal_shows_a_live_display(cli: CommandLine, warm: WarmCommandLine) -> None:
    arguments = ["run", "./tiny.yaml", "--tracker", "none", "seeds=[0]", "train.steps=60", "train.log_every=20"]
    code, screen = run_in_terminal(warm, cli, arguments)
    assert code == 0, screen
    assert "Traceback" not in screen
    assert "\x1b[" in screen  # a live display
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert re.search(r"grid .*/180 cell \d/3", plain)
    for arm in ARMS:
        assert re.search(rf"{arm} · seed 0 .*/60", plain), plain[-3000:]
        assert re.search(rf"done     {arm} · seed 0", plain)
    assert re.search(r"loss \d\.\d{3}  [\d,]+ tokens/s", plain)
    assert "3 of 3 cells done, 3 of them trained now" in plain


def test_the_results_folder_from_the_environment(cli: CommandLine, warm: WarmCommandLine) -> None:
    done = warm(cli, "plan", "./tiny.yaml", environment={"MOEBENCH_RESULTS": "there"})
    assert done.code == 0, done.err
    assert (cli.folder / "there").exists()
    assert not (cli.folder / "results").exists()


def test_a_misspelt_variable_is_named(cli: CommandLine, warm: WarmCommandLine) -> None:
    done = warm(cli, "plan", "./tiny.yaml", environment={"MOEBENCH_RESULT": "there"})
    assert done.code == 0, done.err
    words = "warning: environment variable MOEBENCH_RESULT is unknown and ignored. Did you mean 'MOEBENCH_RESULTS'?"
    assert words in done.err
    assert not (cli.folder / "there").exists()


def test_an_experiment_in_the_folder_experiments_is_known_by_its_name(cli: CommandLine, warm: WarmCommandLine) -> None:
    (cli.folder / "experiments").mkdir()
    (cli.folder / "tiny.yaml").rename(cli.folder / "experiments/mine.yaml")
    ended = warm(cli, "plan", "mine", "--json")
    assert (ended.code, ended.json["experiment"]) == (0, "mine"), ended.err


def test_a_packaged_experiment_is_known_by_its_name_and_path(cli: CommandLine, warm: WarmCommandLine) -> None:
    for name in ("quickstart", "experiments/quickstart.yaml"):
        small = ("seeds=[0]", "task.data.path=text", "train.steps=9", "train.warmup_steps=1")
        ended = warm(cli, "plan", name, "--json", "grid.router=[dense]", *small)
        assert (ended.code, ended.json["experiment"]) == (0, "quickstart"), ended.err
    ended = warm(cli, "plan", "experiments/quickstrt.yaml")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "experiments/quickstrt.yaml: no such experiment file. Did you mean 'quickstart'?" in ended.err


@pytest.mark.parametrize(
    "name",
    [
        file.stem
        for file in sorted((ROOT / "moebench" / "experiments").glob("*.yaml"))
        if file.stem not in ("languages", "shakespeare")  # their data are not included
    ],
)
def test_the_cells_of_a_packaged_experiment_are_valid(name: str) -> None:
    assert expand(ROOT / "moebench" / "experiments" / f"{name}.yaml").cells


@pytest.mark.slow
def test_the_packaged_experiments_can_be_planned(cli: CommandLine, warm: WarmCommandLine) -> None:
    for file in sorted((ROOT / "moebench" / "experiments").glob("*.yaml")):
        if file.stem in ("languages", "shakespeare"):  # their data are not included
            continue
        ended = warm(cli, "plan", str(file), "--json", "--results", "plans")
        assert ended.code == 0, ended.err
        assert {cell["state"] for cell in ended.json["cells"]} <= {"new", "after tuning"}
