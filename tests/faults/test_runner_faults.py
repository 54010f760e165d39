"""The runner or a worker is killed: nothing finished is lost, and the rest is resumed bit for bit."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine, send, wait_for_step, wait_until
from support.interrupted_grid import CHECKPOINT_EVERY, RESUME, assert_equal_to, assert_resumed, step_times
from support.results_folder import Results, last_step


@pytest.mark.slow
def test_kill_of_the_runner(cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 10, num_done=1)
    send(process, signal.SIGKILL)
    process.communicate(timeout=20)
    cli.assert_no_process_is_left(within_s=10)
    before, first_times = results.written_at(), step_times(folder)
    assert set(results.statuses().values()) == {"done"}
    assert not (folder / "result.json").exists()
    plan = {cell["id"]: cell["state"] for cell in warm(cli, "plan", "./tiny.yaml", "--json").json["cells"]}
    assert plan[folder.name] == "resumable"
    early = warm(cli, "compare", "./tiny.yaml", "--json")
    assert early.code == 0, early.err
    assert len(early.json["missing"]) == 4 - len(before)
    again = warm(cli, *RESUME, "--json")
    assert again.code == 0, again.err
    assert len(again.json["trained"]) == 4 - len(before)
    assert before.items() <= results.written_at().items()  # finished cells were not written again
    assert_resumed(folder, first_times)
    assert_equal_to(reference, cli, warm)


@pytest.mark.slow
def test_kill_of_one_worker(cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine) -> None:
    process = cli.start_training("--json")
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 5, num_done=1)
    (worker,) = cli.workers()
    worker.kill()
    ended = cli.wait(process)
    assert ended.code == 1, ended.err
    cli.assert_no_process_is_left()
    (failed,) = ended.json["failed"]
    assert failed["id"] == folder.name
    assert "SIGKILL" in failed["error"]
    assert Path(cli.folder / failed["log"]) == folder / "log.txt"
    assert len(ended.json["trained"]) == 3
    assert sorted(results.statuses().values()) == ["done", "done", "done", "failed"]
    comparison = warm(cli, "compare", "./tiny.yaml", "--json").json
    assert [(cell["id"], "SIGKILL" in cell["reason"]) for cell in comparison["failed"]] == [(folder.name, True)]
    again = warm(cli, *RESUME, "--json")
    assert (again.code, again.json["trained"]) == (0, [folder.name]), again.err
    assert_equal_to(reference, cli, warm)


@pytest.mark.slow
def test_two_runners_at_once_share_the_grid(
    cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine
) -> None:
    """No cell is trained twice, and no finished cell is damaged."""
    first = cli.start_training("--json")
    # In another order, so that it reaches cells that the first runner has finished after the second read their state.
    second = cli.start_training("--json", "grid.router=[switch,dense]")

    def have_both_ended() -> bool:
        for folder in results.folders():
            num_workers = len(list_workers_of(cli, folder))
            assert num_workers <= 1 or last_step(folder) == 0 or (folder / "result.json").exists()
        return first.poll() is not None and second.poll() is not None

    wait_until(have_both_ended, "the runners did not end", within_s=90)
    ends = [cli.wait(process) for process in (first, second)]
    assert {end.code for end in ends} <= {0, 1}, [end.err for end in ends]
    for end in ends:
        assert "Traceback" not in end.err
        for failed in end.json["failed"]:
            assert failed["error"] == "another process is training this cell"
    trained = [cell for end in ends for cell in end.json["trained"]]
    assert sorted(trained) == sorted({*trained}), "a cell was trained twice"
    assert set(results.statuses().values()) == {"done"}
    again = warm(cli, *RESUME, "--json")
    assert again.code == 0, again.err
    assert_equal_to(reference, cli, warm)


def list_workers_of(cli: CommandLine, folder: Path) -> list[int]:
    """Return the processes that have the journal of a run open."""
    process_ids = []
    for worker in cli.workers():
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        except OSError:
            continue
        process_ids += [worker.pid] if str(folder / "journal.jsonl") in links else []
    return process_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged",
    ["newest", pytest.param("all", marks=pytest.mark.slow), pytest.param("truncated", marks=pytest.mark.slow)],
)
def test_a_damaged_checkpoint_is_not_loaded(
    cli: CommandLine, results: Results, reference: CommandLine, damaged: str, warm: WarmCommandLine
) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=2 * CHECKPOINT_EVERY + 7)
    send(process, signal.SIGINT)
    assert cli.wait(process).code == 130
    files = sorted(folder.glob("checkpoints/step_*.ckpt"))
    assert len(files) == 2
    for checkpoint in files if damaged == "all" else files[-1:]:
        file = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damaged != "truncated" else content[: len(content) // 2])
    first_times = step_times(folder)
    again = warm(cli, *RESUME)
    assert again.code == 0, again.err
    log = (folder / "log.txt").read_text()
    assert f"{files[-1].name}: " in log
    if damaged != "all":
        assert_resumed(folder, first_times)
        kept = sum(step_times(folder)[step] == first_times[step] for step in first_times)
        assert kept == int(files[0].stem.removeprefix("step_"))
    assert_equal_to(reference, cli, warm)


def test_kill_between_the_last_checkpoint_and_the_result(
    cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine
) -> None:
    """All steps are done and only the result is missing: it is written again, with the throughput."""
    shutil.copytree(reference.folder / "results", results.path)
    for folder in results.folders():
        (folder / "result.json").unlink()
    assert warm(cli, *RESUME).code == 0
    assert_equal_to(reference, cli, warm)


@pytest.mark.slow
def test_kills_at_random_times(
    cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine
) -> None:
    """After twelve kills at random times the results are those of an uninterrupted run."""
    rng = random.Random(1)
    for _ in range(12):
        process = cli.start_training()
        time.sleep(rng.uniform(3.0, 5.0))
        send(process, signal.SIGKILL)
        process.communicate(timeout=20)
        cli.assert_no_process_is_left()
        for file in itertools.chain(results.path.rglob("*.json"), results.path.rglob("result.json")):
            json.loads(file.read_text())  # complete or absent
    assert warm(cli, *RESUME).code == 0
    assert_equal_to(reference, cli, warm)
    temporary_files = [file for file in results.path.rglob("*") if ".tmp" in file.name]
    assert not temporary_files
