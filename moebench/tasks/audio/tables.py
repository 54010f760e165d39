"""Rows with audio from parquet files, manifests, folders and a hub, before anything is decoded."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.tasks.sources import load_dataset

TABLES = (".parquet", ".csv", ".jsonl")
SOUNDS = (".wav", ".flac", ".ogg")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A source of rows with named columns."""

    name: str
    columns: Sequence[str]
    rows: Callable[[list[str]], Iterator[Mapping[str, Any]]]
    """Reads the rows, with the columns that are asked for."""
    folder: Path = Path()
    """What paths in it are relative to."""


@dataclass(frozen=True, kw_only=True)
class FolderRow:
    """An audio file of a folder without a table."""

    name: str
    path: Path
    target: str
    domain: str


def named_files(root: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Return the files below a folder by their name in it, hidden ones left out; a file by its own name."""
    if root.is_file():
        return {root.name: root} if root.suffix.lower() in endings else {}
    found = (path for path in root.rglob("*") if path.suffix.lower() in endings and path.is_file())
    return {path.relative_to(root).as_posix(): path for path in sorted(found) if path.name[0] not in "._"}


def local_table(path: Path) -> Table:
    """Open a parquet file or a manifest."""
    if path.suffix.lower() == ".parquet":
        return _parquet_table(path)
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    if not rows:
        raise UsageError(f"task.data.path: '{path.name}' has no rows")
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        return ({column: row.get(column) for column in wanted} for row in rows)

    return Table(name=path.name, columns=columns, rows=read, folder=path.parent)


def hub_table(name: str, config: str | None, *, split: str, revision: str | None) -> Table:
    """Open a data set of the hub; its audio stays undecoded, which `datasets` would leave to torchcodec."""
    found = load_dataset(name, config, split=split, revision=revision)

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        import datasets

        chosen = found.select_columns(wanted)
        for column in wanted:
            if isinstance(chosen.features[column], datasets.Audio):
                chosen = chosen.cast_column(column, datasets.Audio(decode=False))
        return iter(chosen)

    return Table(name=name, columns=found.column_names, rows=read)


def folder_rows(root: Path, files: Mapping[str, Path], target: str) -> Iterator[FolderRow]:
    """Yield the files of a folder: the transcript from the .txt beside each, or the class from its folder's name."""
    for name, path in files.items():
        first, _, rest = name.partition("/")
        if target == "label":
            if not rest:
                raise UsageError(
                    f"task.data.path: '{name}' lies in no folder that names its class ({root.name}/CLASS/)"
                )
            yield FolderRow(name=name, path=path, target=path.parent.name, domain="")
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UsageError(
                f"task.data.path: '{name}' has no transcript; give '{text.name}' beside it, or a manifest (.csv)"
            )
        yield FolderRow(name=name, path=path, target=text.read_text(), domain=first if rest else "")


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        for batch in file.iter_batches(batch_size=64, columns=wanted):
            yield from batch.to_pylist()

    return Table(name=path.name, columns=file.schema_arrow.names, rows=read, folder=path.parent)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines))


def _json_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
