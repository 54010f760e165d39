import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run_folders import write_cell

from moebench.errors import UsageError
from moebench.experiment.grid import expand
from moebench.experiment.store import open_results
from moebench.file_access import open_member, open_to_write, read_plain_file, require_no_links
from moebench.runs.folder import RunFolder, write_json
from moebench.runs.journal import Journal, read_journal
from moebench.runs.recorder import RunRecorder, read_loads
from moebench.tasks.cache import load_or_create
from moebench.tracking.source import RunSource, list_recorded_experiments, list_unreadable
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
    for path, read in (
        (folder.cell, folder.read_cell),
        (folder.result, folder.read_result),
        (folder.journal, lambda: read_journal(folder.journal)),
        (folder.loads, lambda: read_loads(folder.loads)),
        (folder.labels, lambda: read_label_tables(folder.labels)),
    ):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(UsageError, match=re.escape(str(path))):
            read()
        path.unlink()
