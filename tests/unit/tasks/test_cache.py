"""The cache of prepared data: keyed by content, created once by many processes, recreated when damaged."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.task_data import write_data

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.tasks.cache import Arrays, load_or_create
from moebench.tasks.task import Task
from moebench.training.model import prepare_task

META = {"names": ["a", "b"]}


def create() -> tuple[dict[str, Any], Arrays]:
    """Return two arrays."""
    return dict(META), {"one": np.arange(1000, dtype=np.int32), "two": np.linspace(0, 1, 7)}


PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
from moebench.tasks.cache import load_or_create

def make():
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(1.0)
    return {}, {"one": np.arange(1000)}

print("ready", flush=True)
sys.stdin.readline()
meta, arrays = load_or_create(Path(sys.argv[1]), make)
print(meta["digest"], arrays["one"].sum())
"""


def refuse() -> tuple[dict[str, Any], Arrays]:
    raise AssertionError("what is there was made again")


def test_an_existing_entry_is_memory_mapped(tmp_path: Path) -> None:
    load_or_create(tmp_path / "entry", create)
    meta, arrays = load_or_create(tmp_path / "entry", refuse)
    assert meta["names"] == ["a", "b"]
    assert arrays["one"].tolist() == [*range(1000)]
    assert type(arrays["one"]) is np.ndarray
    assert isinstance(arrays["one"].base, np.memmap)
    assert not arrays["one"].flags.writeable


def cut(folder: Path) -> None:
    """Take the last bytes away, as a full disk does."""
    file = folder / "one.npy"
    file.write_bytes(file.read_bytes()[:-100])


def cut_to_nothing(folder: Path) -> None:
    (folder / "one.npy").write_bytes(b"")


def cut_in_the_head(folder: Path) -> None:
    file = folder / "one.npy"
    file.write_bytes(file.read_bytes()[:40])


def flip(folder: Path) -> None:
    """Change one bit of a number."""
    file = folder / "one.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def reshape(folder: Path) -> None:
    """Keep the bytes of the numbers and change their description."""
    np.save(folder / "one.npy", np.load(folder / "one.npy").reshape(10, 100))


def lose(folder: Path) -> None:
    (folder / "two.npy").unlink()


def cut_meta(folder: Path) -> None:
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:-5])


def other_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("[]")


def changed_meta(folder: Path) -> None:
    """Change a name and keep the JSON valid."""
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"b"', '"c"'))


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES = (
    cut, cut_to_nothing, cut_in_the_head, flip, reshape, lose, cut_meta, other_meta, changed_meta, no_folder
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_recreated(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "entry"
    before, _ = load_or_create(folder, create)
    damage(folder)
    calls = []
    meta, arrays = load_or_create(folder, lambda: calls.append(1) or create())
    assert len(calls) == 1
    assert meta == before
    assert arrays["one"].tolist() == [*range(1000)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "entry.lock"]
    load_or_create(folder, refuse)


def test_concurrent_processes_create_an_entry_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "entry", tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = {process.communicate()[0] for process in processes}
    assert outputs == {f"{load_or_create(folder, refuse)[0]['digest']} 499500\n"}
    assert log.read_text() == "made\n"


def test_a_failed_creation_leaves_no_entry_and_the_next_one_succeeds(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="made again"):
        load_or_create(tmp_path / "entry", refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    assert load_or_create(tmp_path / "entry", create)[0]["names"] == ["a", "b"]


def test_a_cache_that_must_not_be_written_is_replaced_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = load_or_create(tmp_path / "elsewhere" / "entry", create)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path)  # relative paths: another user must not search the folders above
    tmp_path.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:  # no permission applies to root
        os.seteuid(65534)
    try:
        meta, arrays = load_or_create(Path("cache") / "entry", create)
    finally:
        if is_root:
            os.seteuid(0)
    assert meta == expected
    assert arrays["one"].tolist() == [*range(1000)]
    assert list(cache.iterdir()) == []


def test_a_file_in_place_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match=r"cache: '.*entry' cannot be written"):
        load_or_create(tmp_path / "cache" / "entry", create)


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    half, other = tmp_path / "entry.x7d_", tmp_path / "entry2.x7d_"
    for folder in (half, other):
        folder.mkdir()
        (folder / "one.npy").write_bytes(b"half")
    load_or_create(tmp_path / "entry", create)
    assert not half.exists()
    assert other.exists()  # of another entry, whose lock is not held here


# --- through the tasks


@pytest.fixture
def options(tmp_path: Path) -> Mapping[str, Mapping[str, Any]]:
    (tmp_path / "data").mkdir()
    options = write_data(tmp_path / "data")
    picture = tmp_path / "data" / "pictures" / "class0" / "0.png"
    Image.open(picture).save(picture.with_suffix(".bmp"))  # where a byte is a pixel
    picture.unlink()
    return options


SOURCES = {
    # File, and which of its bytes is changed.
    "language": ("text/text.jsonl", 11),
    "vision": ("pictures/class0/0.bmp", -1),
    "speech": ("words/a/aba.wav", -2),
}


def prepare_named(name: str, options: Mapping[str, Mapping[str, Any]], tmp_path: Path) -> Task:
    return prepare_task(resolve({"task": {"name": name, **options[name]}}), tmp_path)


def entries(tmp_path: Path) -> dict[str, int]:
    """Return the prepared data in the cache, and when each was written."""
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return {path.name: path.stat().st_mtime_ns for path in folders if not path.name.startswith("kinds-")}


@pytest.mark.parametrize("name", SOURCES)
def test_one_changed_byte_is_another_entry(name: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    where, place = SOURCES[name]
    file = tmp_path / "data" / where
    first, before = prepare_named(name, options, tmp_path), entries(tmp_path)
    assert len(before) == 1
    original = file.read_bytes()
    changed = bytearray(original)
    changed[place] ^= 1
    file.write_bytes(changed)
    second, after = prepare_named(name, options, tmp_path), entries(tmp_path)
    assert len(after) == 2
    assert before.items() <= after.items()
    assert second.digest != first.digest
    file.write_bytes(original)
    assert prepare_named(name, options, tmp_path).digest == first.digest
    assert entries(tmp_path) == after


@pytest.mark.parametrize("name", SOURCES)
def test_a_task_makes_truncated_data_again(name: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    digest = prepare_named(name, options, tmp_path).digest
    (entry,) = entries(tmp_path)
    largest = max((tmp_path / "cache" / entry).glob("*.npy"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert prepare_named(name, options, tmp_path).digest == digest
    assert np.load(largest, mmap_mode="r").size > 0
