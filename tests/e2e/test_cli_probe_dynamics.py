"""`probe --show history, agreement, ablations` on real runs with kept checkpoints, which other commands know, too."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.command_line import FIXTURE_TIMEOUT_S, CommandLine, WarmCommandLine
from support.results_folder import Results

TRAIN = {"keep_checkpoints": ["10%", 6]}
"""Steps 1 and 6 of 12."""


def train(warm: WarmCommandLine, router: str, seeds: list[int], folder: Path) -> None:
    """Train an arm and keep weights."""
    command_line = CommandLine(folder)
    layout = {"name": "every_n", "n": 1, "num_experts": 4}
    command_line.write(grid={"router": [router]}, baseline=router, seeds=seeds, train=TRAIN, base={"layout": layout})
    try:
        ended = warm.train(command_line, timeout=FIXTURE_TIMEOUT_S)
    finally:
        command_line.kill_leftovers()
    assert ended.code == 0, ended.err


@pytest.fixture
def kept(
    built_once: Callable[[str, Callable[[Path], Any]], Path], tmp_path: Path, warm: WarmCommandLine
) -> CommandLine:
    """A copy of the folder with the runs."""
    shutil.copytree(built_once("kept weights", partial(train, warm, "top_k", [0, 1, 2])), tmp_path / "copy")
    return CommandLine(tmp_path / "copy")


def folder_of(kept: CommandLine, arm: str, seed: int = 0) -> Path:
    return Results(kept.folder / "results").folder(arm, seed)


def test_every_section_of_a_run(kept: CommandLine, warm: WarmCommandLine) -> None:
    run = folder_of(kept, "top_k").name
    ended = warm(kept, "probe", run, "--show", "history,agreement,ablations", "--json", "--tokens", "64")
    assert ended.code == 0, ended.err
    report = ended.json
    assert len({report[name]["probe_set"]["digest"] for name in ("history", "agreement", "ablations")}) == 1
    assert report["history"]["probe_set"]["tokens"] == 64
    checkpoints = report["history"]["layers"]["0"]["checkpoints"]
    assert [each["step"] for each in checkpoints] == [0, 1, 6, 12]
    first, last = checkpoints[0], checkpoints[-1]
    assert (last["saturation"], last["matched_similarity"], last["still_changing"]) == (1, pytest.approx(1), None)
    assert first["churn"] is None
    assert 0 < first["chance"] < 1
    assert all(len(each["random_coactivation"]) == 8 for each in report["history"]["layers"]["1"]["checkpoints"])
    agreement = report["agreement"]["layers"]["1"]
    assert [pair["seeds"] for pair in agreement["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert agreement["interval"][0] < agreement["corrected"] < agreement["interval"][1]
    ablations = report["ablations"]
    assert [(each["layer"], each["expert"]) for each in ablations["experts"]] == [
        (layer, expert) for layer in ("0", "1") for expert in range(4)
    ]
    kinds = [(each["layer"], each["kind"], each["step"]) for each in ablations["routers"]]
    assert kinds[:3] == [("0", "shuffled", None), ("1", "shuffled", None), ("all", "shuffled", None)]
    assert {step for _, kind, step in kinds if kind == "step"} == {0, 1, 6}
    assert {*ablations["experts"][0]["by_label"]} == {"domain", "position", "token"}
    # The loss as trained and its changes are in nats; bits per byte is the same in bits, as every token is a byte.
    changed = ablations["experts"][0]
    bits = (ablations["loss"] + changed["change"]) / 0.6931471805599453
    assert changed["quality"]["bits_per_byte"] == pytest.approx(bits, rel=0.05)  # it is averaged over domains


@pytest.mark.slow
def test_hash_is_the_same_in_every_seed(cli: CommandLine, warm: WarmCommandLine) -> None:
    train(warm, "hash", [0, 1], cli.folder)
    run = folder_of(cli, "hash").name
    ended = warm(cli, "probe", run, "--show", "history,agreement", "--json", "--tokens", "64")
    assert ended.code == 0, ended.err
    for layer in ended.json["history"]["layers"].values():
        assert [each["saturation"] for each in layer["checkpoints"]] == [1, 1, 1, 1]
        assert [each["churn"] for each in layer["checkpoints"]] == [None, 0, 0, 0]
    for layer in ended.json["agreement"]["layers"].values():
        assert (layer["agreement"], layer["corrected"]) == (1, pytest.approx(1))


@pytest.mark.parametrize("section", ["history", "agreement", "ablations"])
def test_a_section_as_text_and_as_a_figure(
    kept: CommandLine, warm: WarmCommandLine, tmp_path: Path, section: str
) -> None:
    line = ["--show", section, "--plot", str(tmp_path / "x.png"), "--layer", "1", "--tokens", "64"]
    ended = warm(kept, "probe", folder_of(kept, "top_k").name, *line)
    assert ended.code == 0, ended.err
    words = {"history": "saturation", "agreement": "corrected", "ablations": "tokens shuffled"}
    assert words[section] in ended.out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(kept: CommandLine, warm: WarmCommandLine) -> None:
    run = folder_of(kept, "top_k")
    for more, words in [
        (["--show", "history", "--layer", "7"], ["--layer: '7'", "Allowed: 0, 1"]),
        (["--show", "ablations", "--tokens", "32", "--label", "domains"], ["--label: 'domains'", "'domain'"]),
        (["--show", "histroy"], ["--show: 'histroy'", "Did you mean 'history'"]),
    ]:
        ended = warm(kept, "probe", run.name, *more)
        assert (ended.code, ended.out) == (2, "")
        assert all(word in ended.err for word in words)
        assert ended.err.count("\n") == 1
    shutil.rmtree(run / "checkpoints" / "kept")
    for seed in (1, 2):
        shutil.rmtree(folder_of(kept, "top_k", seed))
    for section, words in [("history", "has no kept checkpoints"), ("agreement", "no other seed of the arm 'top_k'")]:
        ended = warm(kept, "probe", run.name, "--show", section)
        assert (ended.code, ended.out) == (2, "")
        assert words in ended.err
        assert ended.err.count("\n") == 1


def test_a_dense_run_is_refused(finished: CommandLine, warm: WarmCommandLine) -> None:
    run = Results(finished.folder / "results").folder("dense", 0).name
    for section in ("history", "agreement", "ablations"):
        ended = warm(finished, "probe", run, "--show", section)
        assert (ended.code, ended.out) == (2, "")
        assert f"--show {section}: the router 'dense' of run {run} has no experts to choose from" in ended.err


def test_verify_plan_and_rm_know_kept_weights(kept: CommandLine, warm: WarmCommandLine) -> None:
    run = folder_of(kept, "top_k")
    damaged = run / "checkpoints" / "kept" / "step_0000006.ckpt"
    (damaged / "rest.pt").write_bytes(b"damaged")
    ended = warm(kept, "verify", "--tracker", "none", "--json")
    problems = [each for each in ended.json["findings"] if str(damaged).endswith(each["where"])]
    assert len(problems) == 1
    assert "checksum" in problems[0]["problem"]
    history = warm(kept, "probe", run.name, "--show", "history", "--json", "--tokens", "64")
    assert history.code == 0, history.err
    assert [each["step"] for each in history.json["history"]["layers"]["0"]["checkpoints"]] == [0, 1, 12]
    assert "step_0000006.ckpt: damaged" in history.json["history"]["notes"][0]
    rows = [
        json.loads(warm(kept, "plan", "./tiny.yaml", *more, "--json").out)["cells"][0]
        for more in ([], ["train.keep_checkpoints=[]"])
    ]
    assert rows[0]["id"] == rows[1]["id"] == run.name
    assert rows[0]["disk_bytes"] - rows[1]["disk_bytes"] == 2 * 4 * rows[0]["total_params"]
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    removed = warm(kept, "rm", run.name, "--yes", "--tracker", "none", "--json")
    assert removed.code == 0, removed.err
    assert removed.json["bytes"] >= size
    assert not run.exists()
