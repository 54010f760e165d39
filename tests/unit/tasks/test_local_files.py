"""Local folders and tables: which files are read, warnings about others, and splits by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebench.errors import UsageError
from moebench.runs.journal import is_valid_metric_name
from moebench.tasks.audio.clips import AudioDataConfig, load_clips
from moebench.tasks.folders import assign_parts, find_source, list_files, list_parent_folders, warn_unread_files
from moebench.tasks.images.sources import ImageDataConfig, read_entries
from moebench.tasks.sources import LOADERS
from moebench.tasks.tables import Table, open_table, read_name
from moebench.tasks.task import metric_names
from moebench.tasks.text.sources import TextDataConfig


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_all_files_are_found_but_hidden_ones(tmp_path: Path) -> None:
    seen = ["A/one.PNG", "a b/zwei drei.png", "_DSC1.png", "é/ü.png", "deep/er/still.png"]
    write(tmp_path / "set", *seen, ".hidden.png", ".cache/x.png", "__MACOSX/x.png", "other.txt", "png")
    assert sorted(list_files(tmp_path / "set", (".png",))) == sorted(seen)


def test_links_are_followed_and_broken_ones_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "x.png", "y.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "one.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")  # never ends, if it were followed
    assert list(list_files(tmp_path / "set", (".png",))) == ["cat/x.png", "cat/y.png", "gone.png", "one.png"]


def test_files_of_other_kinds_are_counted_in_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.png", "b.heic", "c.HEIC", "d", ".hidden.doc")
    warn_unread_files(str(tmp_path), (".png",))
    assert capsys.readouterr().err == (
        f"task.data: '{tmp_path}' has 3 file(s) of other kinds, which are not read (2 .heic, 1 no ending)\n"
    )
    warn_unread_files(str(tmp_path / "a.png"), ())
    warn_unread_files(None, ())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["gon", "x" * 300, "a\0b", "a.png/b"])
def test_a_missing_path_is_reported_in_one_line(tmp_path: Path, name: str) -> None:
    write(tmp_path, "gone", "a.png")
    with pytest.raises(UsageError, match=r"^task\.data\.path: '") as caught:
        find_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert ("Did you mean 'gone'?" in str(caught.value)) == (name == "gon")


PARTS = {
    "train/a.x test/a.x": "train test",
    "Train/a.x VAL/a.x": "train validation",
    "training/a.x valid/a.x testing/a.x": "train validation test",
    "train.x dev.x test.x": "train validation test",
    "train-0.x train_1.x validation-0.x": "train train validation",
    "en/train/a.x en/test/a.x fr/train/a.x": "train test train",
    "data/train/cat/a.x data/val/cat/a.x": "train validation",
    "train/a.x train/b.x": "train train",  # all there is
    "test.x": "train",
    "cat/a.x dog/a.x": None,
    "train/a.x plane/a.x": None,  # a class of pictures of trains
    "trainees.x testament.x": None,
    "train-station/a.x test-tube/a.x": None,  # the whole name of a folder counts
}


@pytest.mark.parametrize(("names", "parts"), PARTS.items(), ids=PARTS)
def test_names_determine_the_split_of_a_file(names: str, parts: str | None) -> None:
    part_of = assign_parts(names.split(), by_file=True)
    assert list(part_of.values()) == (parts.split() if parts else [])
    by_folder = assign_parts(names.split(), by_file=False)
    assert by_folder == (part_of if "/" in names else {})


def test_ambiguous_splits_are_refused() -> None:
    with pytest.raises(UsageError, match="'extra/a' belongs to no split, but other files belong to train and test"):
        assign_parts(["train/a", "test/a", "extra/a"], by_file=False)
    with pytest.raises(UsageError, match="there are the splits validation and test, but no train"):
        assign_parts(["val/a", "test/a"], by_file=False)
    # A table called so is no class: rows that were kept apart must not be trained on.
    with pytest.raises(UsageError, match=r"'data\.csv' belongs to no split, but other files belong to test"):
        assign_parts(["data.csv", "test.csv"], by_file=True)
    assert list_parent_folders("en/train/a.txt", divided=True) == ["en"]
    assert list_parent_folders("train/cat/small/a.png", divided=True) == ["cat", "small"]
    assert list_parent_folders("train/cat/a.png", divided=False) == ["train", "cat"]
    assert list_parent_folders("train.png", divided=True) == []


def read(table: Table, *columns: str) -> list[dict[str, Any]]:
    return [dict(row) for _, row in table.read(columns)]


CELLS = [
    {"text": 'NA, "quoted"\nline', "label": "007"},
    {"text": "null", "label": "1e5"},
    {"text": "é" * 200_000, "label": "true"},
]


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.csv.gz", "a.jsonl", "a.JSONL.GZ", "a.json", "a.parquet"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_keep_their_text(tmp_path: Path, name: str, mark: str) -> None:
    lower = name.lower()
    text = {
        ".csv": "\r\n".join(
            ["text,label", *(",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in CELLS)]
        ),
        ".jsonl": "\n".join(json.dumps(row) for row in CELLS) + "\n\n",
        ".json": json.dumps(CELLS, indent=1),
    }
    if lower.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(CELLS), tmp_path / name)
    else:
        data = (mark + text["." + lower.split(".")[1]]).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if lower.endswith(".gz") else data)
    table = open_table(tmp_path / name)
    assert list(table.columns) == ["text", "label"]
    assert read(table, "text", "label", "text") == CELLS


def test_columns_of_every_type_of_parquet(tmp_path: Path) -> None:
    columns = {
        "large": pa.array(["a", "b"], pa.large_string()),
        "coded": pa.array(["x", "y"]).dictionary_encode(),
        "nested": pa.array([{"a": {"b": 1}}, None]),
        "class": pa.array([1, -1]),
        "plain": pa.array([1, -1]),
    }
    features = {"class": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "plain": {"_type": "Value"}}
    features["nested"] = [{"b": {"_type": "Value"}}]  # as older versions of datasets write a list
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert read(open_table(tmp_path / "a.parquet"), *columns) == [
        {"large": "a", "coded": "x", "nested": {"a": {"b": 1}}, "class": "dog", "plain": 1},
        {"large": "b", "coded": "y", "nested": None, "class": None, "plain": -1},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_columns_are_those_of_the_whole_file(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"text": str(number)} for number in range(1100)]
    rows += [{"text": "1100", "domain": "d", "label": 7}, {"speaker": "s"}]
    text = json.dumps(rows) if ".jsonl" not in name else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    table = open_table(tmp_path / name)
    assert table.columns == ["text", "domain", "label", "speaker"]
    cells = [tuple(row.values()) for row in read(table, "speaker", "domain")]
    assert cells[1099:] == [(None, None), (None, "d"), ("s", None)]


def test_a_column_of_late_rows_counts_for_images_and_recordings(tmp_path: Path) -> None:
    pictures = [{"image": f"{number}.png"} for number in range(1100)] + [{"image": "x.png", "label": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pictures)))
    with pytest.raises(UsageError, match=r"'label' of a\.jsonl, row 0 is empty \(null\), not a whole number or name"):
        read_entries(ImageDataConfig(path=str(tmp_path / "a.jsonl")))
    sounds = [{"file": f"{number}.wav", "text": "a"} for number in range(1100)]
    sounds += [{"file": "x.wav", "text": "b", "language": "en"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, sounds)))
    with pytest.raises(
        UsageError, match=r"domain_column: 'language' of b\.jsonl, row 0 is empty, not a name or number"
    ):
        list(load_clips(AudioDataConfig(path=str(tmp_path / "b.jsonl")), "transcript"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("file,text,language\na.wav,a,en\n")
    (tmp_path / "set" / "b.csv").write_text("file,text\nb.wav,a\n")
    with pytest.raises(UsageError, match=r"'language' is a column of a\.csv and not of b\.csv; add it to every file"):
        list(load_clips(AudioDataConfig(path=str(tmp_path / "set")), "transcript"))
    clips = load_clips(AudioDataConfig(path=str(tmp_path / "set"), domain_column=None), "transcript")
    assert [clip.domain for clip in clips] == ["all", "all"]


SOURCES = (TextDataConfig, ImageDataConfig, AudioDataConfig)


@pytest.mark.parametrize("config", SOURCES)
def test_files_under_the_key_of_the_hub_are_refused(tmp_path: Path, monkeypatch, config: type) -> None:
    write(tmp_path, "folder/a.parquet", "owner/name/a.parquet", "data.csv")
    monkeypatch.chdir(tmp_path)
    for name in ("./folder", "folder", "owner/name", "../anything", "./gone", "~/gone", "~nobody", "/gone", "data.csv"):
        with pytest.raises(UsageError) as caught:
            config(dataset=name)
        assert str(caught.value) == (
            f"task.data.dataset: '{name}' is a local path, not the name of a data set on the hub;"
            f" give task.data.path={name}"
        )
    with pytest.raises(UsageError, match=r"'imagefolder' is a loader of local files.*task\.data\.path=\.\.\."):
        config(dataset="imagefolder")
    for name in ("mnist", "owner/other", "x" * 5000, "a\0b"):
        assert config(dataset=name).dataset == name


def test_the_readers_of_local_files_are_those_of_the_library() -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert set(_PACKAGED_DATASETS_MODULES) <= {*LOADERS.split()}


BAD_TABLES: dict[str, tuple[bytes, str]] = {
    "latin1.csv": ("text\nGröße\n".encode("latin-1"), "not UTF-8.*iconv"),
    "utf16.csv": ("text\nx\n".encode("utf-16"), "not UTF-8.*iconv"),
    "utf16.jsonl": ('{"text": "x"}'.encode("utf-16"), "not UTF-8.*iconv"),
    "comma.csv": (b"text,label\nwell, yes,1\n", "3 cells in line 2 and 2 columns; quote"),
    "twice.csv": (b"text,text\na,b\n", "two columns 'text'"),
    "quote.csv": (b'text\n"never closed\nx\n', "unexpected end"),
    "header.csv": (b"text,label\n", "no rows"),
    "empty.csv": (b"", "no rows"),
    "empty.jsonl": (b"\n", "no rows"),
    "torn.jsonl": (b'{"text": "x"}\n{"text": ', "line 2: "),
    "list.jsonl": (b'["text"]\n', "cannot be read|not an object"),
    "list.json": (b'["text"]', "row 0 of 'list.json' is str, not an object"),
    "gz.csv.gz": (b"text\nx\n", "[Nn]ot a gzip"),
    "torn.csv.gz": (gzip.compress(b"text\n" + bytes(range(97, 120)) * 99)[:-20], "cannot be read"),
    "empty.parquet": (b"", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_one_line_with_its_name(tmp_path: Path, name: str) -> None:
    content, words = BAD_TABLES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        list(open_table(tmp_path / name).read(["text"]))
    assert f"'{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cells_that_name_something() -> None:
    assert [read_name(value, "k", "c", "p") for value in ("x", 3, 0.5, True)] == ["x", "3", "0.5", "True"]
    for value, kind in (
        (None, "empty"),
        ("", "empty"),
        (float("nan"), "empty"),
        (b"x", "bytes"),
        (["x"], "list"),
        ({}, "dict"),
    ):
        with pytest.raises(UsageError, match=rf"^task\.data\.k: 'c' of p is {kind}.*, not a name or number$"):
            read_name(value, "k", "c", "p")


def test_names_of_data_become_names_that_trackers_accept() -> None:
    names = ("fashion/t-shirt", "C++", "C--", "été", "日本", "中国", "../x", "a//b", "x" * 300, "", " ")
    plain = metric_names(names)
    assert plain[:5] == ("fashion/t-shirt", "C__", "C--", "ete", "___4")
    assert len(set(plain)) == len(names)
    assert all(is_valid_metric_name(f"class_accuracy/{name}") for name in plain)
