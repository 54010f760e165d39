"""Files of a run folder that are damaged, changed or of another run are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.run_folders import write_cell, write_result

from moebench.cli.listing import _run_rows
from moebench.errors import UsageError
from moebench.runs.experiment_record import read_records
from moebench.runs.folder import RunFolder, list_run_folders


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.of(tmp_path, "aaaa")
    write_cell(folder.path)
    write_result(folder.path, metrics={"bits_per_byte": 2.5}, cost={"active_params": 10.0})
    return folder


def change(file: Path, **changes: Any) -> None:
    """Change values as a version without checksums would have written them."""
    values = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
    file.write_text(json.dumps(values | changes))


def refusal(folder: RunFolder, file: Path) -> str:
    with pytest.raises(UsageError) as refused:
        folder.read_result() if file == folder.result else folder.read_cell()
    text = str(refused.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    return text


def test_a_changed_digit_is_refused(folder: RunFolder) -> None:
    assert folder.read_result() is not None
    folder.result.write_text(folder.result.read_text().replace("2.5", "2.4"))
    assert "does not match its checksum" in refusal(folder, folder.result)
    folder.cell.write_text(folder.cell.read_text().replace('"seed": 0', '"seed": 1'))
    assert "does not match its checksum" in refusal(folder, folder.cell)


def test_formatting_does_not_matter(folder: RunFolder) -> None:
    folder.result.write_text(json.dumps(json.loads(folder.result.read_text())))
    assert folder.read_result() is not None


def test_files_of_another_run_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.of(tmp_path, "bbbb")
    other.path.mkdir(parents=True)
    other.result.write_bytes(folder.result.read_bytes())
    other.cell.write_bytes(folder.cell.read_bytes())
    assert "it is of the run aaaa, in the folder of bbbb" in refusal(other, other.result)
    assert "it is of the run aaaa, in the folder of bbbb" in refusal(other, other.cell)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": None}, "'metrics' is 'None', expected an object"),
        ({"metrics": {"a": "x"}}, "'metrics' has 'x' at 'a', expected a number"),
        ({"cost": {"a": None}}, "'cost' has 'None' at 'a'"),
        ({"throughput": []}, "'throughput' is"),
        ({"validation": 1}, "'validation' is"),
        ({"status": "finished"}, "'status' is 'finished', expected done, failed, stopped"),
        ({"step": True}, "'step' is 'True', expected an integer"),
        ({"marks": [1]}, "must hold texts"),
        ({"config": None}, "'config' is"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_wrong_types_in_a_result(folder: RunFolder, changes: dict[str, Any], reason: str) -> None:
    change(folder.result, **changes)
    assert reason in refusal(folder, folder.result)


@pytest.mark.parametrize("changes", [{"config": None}, {"arm": 1}, {"data": {}}, {"plugins": 3}, {"seed": "0"}])
def test_wrong_types_in_a_cell(folder: RunFolder, changes: dict[str, Any]) -> None:
    change(folder.cell, **changes)
    refusal(folder, folder.cell)


def test_files_that_are_no_json_objects(folder: RunFolder) -> None:
    for file in (folder.result, folder.cell):
        for content in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"):
            file.write_bytes(content)
            refusal(folder, file)
        file.unlink()
        file.mkdir()
        refusal(folder, file)


def test_records_that_were_changed_after_the_end(folder: RunFolder) -> None:
    folder.labels.write_text("{}")
    result = folder.read_result()
    assert result is not None
    write_result(folder.path, records=folder.digest_records())
    folder.require_unchanged(folder.labels)
    folder.labels.write_text("{ }")
    with pytest.raises(UsageError, match=r"labels\.json: was changed after the run was done"):
        folder.require_unchanged(folder.labels)


def test_a_file_in_place_of_the_folder_of_runs(tmp_path: Path) -> None:
    assert list_run_folders(tmp_path) == []
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="cannot be read as the folder of runs"):
        list_run_folders(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"name": "other"}',
        '{"name": "other", "cells": [{}]}',
        '{"name": "other", "cells": null}',
        '{"name": "else", "cells": []}',
        '{"name": "other", "cells": [{"id": "../../x"}]}',
    ],
)
def test_a_damaged_record_leaves_the_others(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "good.json").write_text('{"name": "good", "cells": [{"id": "aaaa"}]}')
    (tmp_path / "experiments" / "other.json").write_text(content)
    records, (problem,) = read_records(tmp_path)
    assert [*records] == ["good"]
    assert "other.json" in problem


@pytest.mark.parametrize(("margin", "is_valid"), [(0.01, True), (0, False), (7, False), ("1e-2", False), (True, False)])
def test_the_margin_of_a_record_is_checked(tmp_path: Path, margin: object, is_valid: bool) -> None:
    (tmp_path / "experiments").mkdir()
    record = {"name": "good", "cells": [], "margin": margin}
    (tmp_path / "experiments" / "good.json").write_text(json.dumps(record))
    records, problems = read_records(tmp_path)
    assert (bool(records), bool(problems)) == (is_valid, not is_valid)
    assert is_valid or "'margin' is" in problems[0]


def test_a_run_is_training_while_its_lock_is_held(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "cccc")
    write_cell(folder.path)
    assert folder.describe_state() == "new"
    with FileLock(folder.lock):
        assert folder.describe_state() == "training"
        assert [row["state"] for row in _run_rows(tmp_path)] == ["training"]
        write_result(folder.path, status="failed")  # of the attempt before
        assert folder.describe_state() == "training"
        write_result(folder.path)
        assert folder.describe_state() == "done"
    write_result(folder.path, status="failed")
    assert folder.describe_state() == "failed"
