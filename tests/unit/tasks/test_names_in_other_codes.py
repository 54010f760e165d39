"""Names of files that are not UTF-8, as old archives have: read, and written with the bytes that they have."""

import os
from pathlib import Path

import pytest
from support.sounds import encode_wav, tone
from support.task_data import write_pictures

from moebench.errors import UsageError
from moebench.tasks.audio.clips import AudioDataConfig
from moebench.tasks.audio.utterances import prepare as prepare_sounds
from moebench.tasks.folders import list_files
from moebench.tasks.images.prepared import prepare as prepare_images
from moebench.tasks.images.sources import ImageDataConfig
from moebench.tasks.text.sources import TextDataConfig, load_documents, source_digest

LATIN1 = os.fsdecode("täglich".encode("latin-1"))


@pytest.fixture(autouse=True)
def file_system_with_any_bytes(tmp_path: Path) -> None:
    try:
        (tmp_path / LATIN1).mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (tmp_path / LATIN1).rmdir()


def test_domains_of_text(tmp_path: Path) -> None:
    for name in ("a", LATIN1):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{LATIN1}{number}.txt").write_text(f"document {number} of {name!a}")
    config = TextDataConfig(path=str(tmp_path))
    assert {document.domain for document in load_documents(config)} == {"a", "t\\xe4glich"}
    assert len(source_digest(config)) == 64


@pytest.mark.parametrize("part", ["", "train/"])
def test_classes_of_images(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "images" / part
    folder.mkdir(parents=True)
    write_pictures(folder)
    (folder / "class3").rename(folder / LATIN1)
    prepared = prepare_images(ImageDataConfig(path=str(tmp_path / "images"), size=8), tmp_path / "cache")
    assert prepared.classes == ("class0", "class1", "class2", "t\\xe4glich")


def test_classes_of_sounds(tmp_path: Path) -> None:
    for name in ("a", LATIN1):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            file = tmp_path / "data" / name / f"{LATIN1}{number}_nohash_0.wav"
            file.write_bytes(encode_wav(tone(300 + 50 * number + 7 * (name == "a"))))
    prepared = prepare_sounds(AudioDataConfig(path=str(tmp_path / "data")), tmp_path / "cache", "label")
    assert prepared.symbols == ("a", "t\\xe4glich")


def test_two_names_that_would_be_written_alike_are_refused(tmp_path: Path) -> None:
    for name in (LATIN1, "t\\xe4glich"):
        (tmp_path / f"{name}.txt").write_text("x")
    with pytest.raises(UsageError, match=r"there are two files 't\\xe4glich.txt'"):
        list_files(tmp_path, [".txt"])


def test_a_folder_of_another_code_is_refused_where_its_name_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task.data.path: .*its name is not UTF-8"):
        load_documents(TextDataConfig(path=str(tmp_path / LATIN1)))
