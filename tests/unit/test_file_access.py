import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.run_folders import write_cell

import moebench
from moebench.errors import UsageError
from moebench.experiment.files import list_experiments, list_sizes
from moebench.experiment.grid import expand
from moebench.experiment.sizes import read_size
from moebench.experiment.store import open_results
from moebench.experiment.tracker_check import check_tracker
from moebench.file_access import open_member, open_to_write, read_plain_file, read_plain_json, require_no_links
from moebench.runs.attempts import Attempt, read_attempts, record_attempt
from moebench.runs.folder import RunFolder, write_json
from moebench.runs.journal import Journal, read_journal
from moebench.runs.recorder import RunRecorder, read_loads
from moebench.tasks.cache import load_or_create, read_entry
from moebench.tracking.database import find_database_defect
from moebench.tracking.source import RunSource, list_recorded_experiments, list_unreadable, read_results_id
from moebench.training.label_tables import read_label_tables

PATHS = ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b"]
"""What is not the name of a file."""


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user outside of the results folder, to which an attacker's link points."""
    file = tmp_path / "victim"
    file.write_text("precious")
    return file


def open_journal(path: Path) -> None:
    Journal(path).close()


@pytest.mark.parametrize("write", [open_journal, open_to_write])
def test_files_are_not_written_through_links(tmp_path: Path, victim: Path, write: Callable[[Path], object]) -> None:
    link = tmp_path / "journal.jsonl"
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        write(link)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["journal.jsonl.tmp", "load.jsonl.tmp"])
def test_temporary_files_are_new_files(tmp_path: Path, victim: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    with RunRecorder(folder) as recorder:
        for step in (1, 2):
            recorder.append(step, {"loss": 1.0})
            recorder.record_load(step, {"0": [1, 1]})
        (folder.path / name).symlink_to(victim)
        recorder.rewind(1, {})
    assert victim.read_text() == "precious"
    assert folder.journal.read_text().count("\n") == folder.loads.read_text().count("\n") == 1


def test_a_folder_is_probed_without_a_file_of_known_name(tmp_path: Path, victim: Path) -> None:
    results = tmp_path / "results"
    open_results(results)
    assert not list(results.iterdir())
    (results / ".writable").symlink_to(victim)
    with pytest.raises(UsageError, match=r"\.writable: is a symbolic link"):
        open_results(results)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("place", ["runs", "runs/0123456789ab", "experiments/x", "cache", "mlflow.db"])
def test_links_in_a_results_folder_are_refused(tmp_path: Path, place: str) -> None:
    link, outside = tmp_path / "results" / place, tmp_path / "outside"
    link.parent.mkdir(parents=True)
    outside.mkdir()
    link.symlink_to(outside)
    with pytest.raises(UsageError, match="is a symbolic link") as error:
        open_results(tmp_path / "results")
    assert str(link) in str(error.value)
    assert not list(outside.iterdir())


def test_a_results_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "large_disk")
    open_results(tmp_path / "results")


def test_links_are_found_at_any_depth_and_not_followed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_1.ckpt"
    checkpoint.mkdir(parents=True)
    require_no_links(tmp_path, is_deep=True)
    (checkpoint / "loop").symlink_to(tmp_path)
    require_no_links(tmp_path)
    with pytest.raises(UsageError, match=r"step_1\.ckpt/loop: is a symbolic link"):
        require_no_links(tmp_path, is_deep=True)


def test_prepared_data_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="symbolic link"):
        load_or_create(tmp_path / "cache" / "text-1", lambda: ({}, {}))
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", PATHS)
def test_a_name_from_a_file_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="id of a run"):
        RunFolder.of(tmp_path, name)
    with pytest.raises(ValueError, match="is not the name of a file"):
        open_member(tmp_path, name)
    for file, values in (
        ("experiments/x.json", {"name": name, "cells": []}),
        ("runs/1/cell.json", {"experiment": name}),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        write_json(tmp_path / file, values)
    assert list_recorded_experiments(tmp_path) == {}
    assert len(list_unreadable(tmp_path)) == 2


@pytest.mark.parametrize("name", ["...yaml", "..yaml", "....yml"])
def test_an_experiment_is_not_named_after_another_folder(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("grid: {router: [dense]}")
    stem = file.stem
    if stem in (".", ".."):
        with pytest.raises(UsageError, match="cannot be the name of a file"):
            expand(file)
    else:
        assert expand(file).name == stem  # `...` is a name like any other


def test_the_tracker_is_not_sent_what_a_link_points_to(tmp_path: Path, victim: Path) -> None:
    source = RunSource.of(tmp_path, "0123456789ab")
    source.folder.path.mkdir(parents=True)
    source.folder.environment.write_text("{}")
    source.folder.log.symlink_to(victim)
    (source.folder.path / "x.png").symlink_to(victim)
    os.mkfifo(source.folder.labels)
    assert source.attachments == [source.folder.environment]


def test_pipes_and_devices_in_place_of_records_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "abc")
    write_cell(folder.path)
    with pytest.raises(OSError, match="is not a plain file"):
        read_plain_file(Path("/dev/zero"))
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="has more than 256 MiB"):
        read_plain_file(large)
    with pytest.raises(OSError, match=r"has more than \d+ MiB"):
        read_plain_file(large, None)
    for path, read in (
        (folder.cell, folder.read_cell),
        (folder.result, folder.read_result),
        (folder.journal, lambda: read_journal(folder.journal)),
        (folder.loads, lambda: read_loads(folder.loads)),
        (folder.labels, lambda: read_label_tables(folder.labels)),
        (tmp_path / "tracking_id", lambda: read_results_id(tmp_path)),
    ):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(UsageError, match=re.escape(str(path))):
            read()
        path.unlink()
    for path in (folder.attempts, tmp_path / "entry" / "meta.json", tmp_path / "mlflow.db"):
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
    assert read_attempts(folder.attempts) == []
    with pytest.raises(OSError, match="is not a plain file"):
        record_attempt(folder.attempts, Attempt(started_at=0, seconds=0, status="done", error=None, fault="", step=0))
    assert read_entry(tmp_path / "entry") is None
    assert find_database_defect(tmp_path / "mlflow.db") == "is not a plain file"
    assert [finding.problem for finding in check_tracker(tmp_path)] == ["is not a plain file"]


def test_arrays_of_prepared_data_are_no_pipes(tmp_path: Path) -> None:
    def create() -> tuple[dict[str, int], dict[str, np.ndarray]]:
        return {"size": 3}, {"tokens": np.arange(3)}

    entry = tmp_path / "entry"
    load_or_create(entry, create)
    array = entry / "tokens.npy"
    array.unlink()
    os.mkfifo(array)
    assert read_entry(entry) is None


def test_pipes_among_experiments_and_sizes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "sizes"):
        (tmp_path / folder).mkdir()
        os.mkfifo(tmp_path / folder / "pipe.yaml")
        (tmp_path / folder / "zero.yaml").symlink_to("/dev/zero")
    assert not {"pipe", "zero"} & {*list_experiments(), *list_sizes()}


def test_a_damaged_size_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "X.yaml").write_text("[]")
    with pytest.raises(UsageError, match=r"^sizes/X\.yaml: must be a mapping"):
        read_size("X")


def test_a_file_to_write_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a plain file"):
        open_to_write(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)  # a reader: opening does not fail
    with pytest.raises(OSError, match="is not a plain file"):
        open_to_write(tmp_path / "pipe")
    os.close(descriptor)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 50_000, "", "{", "\x00"])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        read_plain_json(tmp_path / "file.json")


GUARDED = ("runs", "analysis", "tracking", "experiment", "parallel", "tasks/cache.py", "tasks/text/prepared")
"""Packages that read folders which others may have made."""
OF_THE_USER = {
    "runs/environment.py",  # the package itself, and /proc
    "tracking/ui.py",  # a log that the command has just opened
    "tasks/text/prepared/folder_state.py",  # the tokenizer that the user names
    "tasks/text/prepared/build.py",  # the same
}


def test_folders_of_others_are_read_by_the_functions_that_refuse_pipes() -> None:
    package = Path(moebench.__file__).parent
    for place in GUARDED:
        for file in [package / place] if place.endswith(".py") else (package / place).rglob("*.py"):
            name = file.relative_to(package).as_posix()
            calls = re.findall(r"\.(?:read_text|read_bytes)\(", file.read_text())
            assert not calls or name in OF_THE_USER, f"{name}: use read_plain_file or read_plain_json"


def test_an_infinite_step_of_the_loads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").write_text('{"step": 1e999, "layers": {}}\n')
    with pytest.raises(UsageError, match=r"load\.jsonl"):
        read_loads(tmp_path / "load.jsonl")
