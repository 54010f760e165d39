"""A full disk: refused before training if it can be predicted, otherwise a failure of one cell."""

import json
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine, wait_for_step
from support.results_folder import Results

Mount = Callable[[int], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a file system of a size in MiB."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode:
            pytest.skip(f"this machine does not allow to mount a file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], timeout=20, check=True)


def fill(folder: Path) -> Path:
    """Write a file that takes all free space."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as handle:
        for size in (2**20, 4096, 1):
            try:
                while handle.write(b"\0" * size) == size:
                    continue
            except OSError:
                continue
    return file


def test_a_disk_too_small_is_refused_before_training(
    cli: CommandLine, warm: WarmCommandLine, small_disk: Mount
) -> None:
    disk = small_disk(8)
    ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", str(disk / "results"))
    assert ended.code == 2
    assert ended.err.count("\n") == 1, ended.err
    assert re.match(r"error: results folder .*: \d+ MiB free, \d+ MiB needed", ended.err)
    assert not (disk / "results/runs").exists()


def test_a_disk_too_small_for_prepared_data_is_one_line(
    cli: CommandLine, warm: WarmCommandLine, small_disk: Mount
) -> None:
    disk = small_disk(4)
    draw = random.Random(0)
    for number in range(8):  # 3 MB of text, of which a token and its length in bytes take 3 bytes for each
        words = (str(draw.randrange(10**8)) for _ in range(45_000))
        (cli.folder / f"text/a/long{number}.txt").write_text(" ".join(words))
    ended = warm(cli, "plan", "./tiny.yaml", "--results", str(disk / "results"))
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended.err
    assert re.match(r"error: cache: '.*' cannot be written \(.*\): \d+ MiB needed, \d+ MiB free", ended.err)


@pytest.mark.parametrize(
    "moment", [pytest.param("while a cell trains", marks=pytest.mark.slow), "before the data is prepared"]
)
def test_a_disk_that_fills_up_loses_no_finished_cell(
    cli: CommandLine, warm: WarmCommandLine, small_disk: Mount, moment: str
) -> None:
    disk = small_disk(90)
    cli.write(train={"steps": 120, "checkpoint_every": 10}, grid={"router": ["dense", "switch"]})
    results = Results(disk / "results")
    if moment == "before the data is prepared":
        filler = fill(disk)
        ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", str(results.path))
        assert ended.code == 2, ended.err
        assert ended.err.startswith("error: cache: ")
        assert "No space left on device" in ended.err
        assert ended.err.count("\n") == 1, ended.err
        filler.unlink()
        return
    process = cli.start_training("--json", results=str(results.path))
    wait_for_step(results, step=15, num_done=1)
    filler = fill(disk)
    ended = cli.wait(process)
    cli.assert_no_process_is_left()
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err, ended.err
    reasons = [cell["error"] for cell in ended.json["failed"]]
    assert reasons
    assert all("disk" in reason and "full" in reason for reason in reasons), reasons
    finished = {folder.name: (folder / "result.json") for folder in results.folders() if is_done(folder)}
    assert finished
    before = {name: os.stat(file).st_mtime_ns for name, file in finished.items()}
    filler.unlink()
    again = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", str(results.path), "--json")
    assert again.code == 0, again.err
    assert {name: os.stat(file).st_mtime_ns for name, file in finished.items()} == before
    assert len(again.json["trained"]) == 4 - len(finished)


def is_done(folder: Path) -> bool:
    """Return whether the run has a result with the status done; fail if the file is incomplete."""
    file = folder / "result.json"
    return file.exists() and json.loads(file.read_text())["status"] == "done"
