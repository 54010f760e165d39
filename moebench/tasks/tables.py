"""Rows of parquet, CSV and JSON files and of a hub, read the same way by every task."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from moebench.errors import UsageError, nearest
from moebench.tasks.sources import first_line, load_dataset

TABLES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
LONGEST_CELL = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Table:
    """A source of rows with named columns."""

    name: str
    columns: Sequence[str]
    rows: Callable[[list[str]], Iterator[Mapping[str, Any]]]
    """Reads the rows, with the columns that are asked for; what a row lacks is None."""
    folder: Path = Path()
    """What paths in it are relative to."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names behind the numbers of columns that bring such, as data sets of the hub do."""

    def check(self, key: str, column: str) -> None:
        """Raise `UsageError` with the columns that exist unless there is this one, which task.data.`key` names."""
        if column not in self.columns:
            known = f"columns of {self.name}: {', '.join(self.columns)}"
            raise UsageError(f"task.data.{key}: there is no column '{column}'.{nearest(column, self.columns)} {known}")

    def read(self, wanted: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the place of each row, for messages, and its cells, with names for numbers that stand for classes."""
        columns = list(dict.fromkeys(wanted))
        named = [column for column in columns if column in self.classes]
        for number, row in enumerate(self.rows(columns)):
            classes = {column: self._class(column, row[column]) for column in named}
            yield f"{self.name}, row {number}", {**row, **classes}

    def _class(self, column: str, value: Any) -> Any:
        names = self.classes[column]
        if not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None  # -1 is what unlabelled rows have


def named(value: Any, key: str, column: str, place: str) -> str:
    """Return a cell that names something; raise `UsageError` for one that is empty or no word or number."""
    if isinstance(value, str | int | float) and value == value and value != "":
        return str(value)
    kind = "empty" if value in (None, "") or value != value else type(value).__name__
    raise UsageError(f"task.data.{key}: '{column}' of {place} is {kind}, no name or number")


def content_of(value: Any, folder: Path) -> Any:
    """Return what a cell holds, or the path that it names, which may be relative to its table's folder."""
    if isinstance(value, Mapping):  # as the hub stores images and audio
        value = value.get("bytes") or value.get("path")
    return folder / Path(value).expanduser() if isinstance(value, str) and value else value


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that names it."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeError as error:
        raise UsageError(
            f"task.data.path: '{name}' cannot be read: it is not UTF-8 ({first_line(error)}); convert it, as with"
            " iconv -f LATIN1 -t UTF-8"
        ) from error
    except Exception as error:  # the readers of four formats raise almost anything
        raise UsageError(
            f"task.data.path: '{name}' cannot be read ({first_line(error)}); give task.data.path=... a whole file"
        ) from error


def require_alike(tables: Iterable[Table], key: str, column: str) -> Iterator[Table]:
    """Yield tables; raise `UsageError` where some have an optional column, which task.data.`key` names, and some not.

    Otherwise the rows of those without would be of another domain than all others, in silence.
    """
    first: Table | None = None
    for table in tables:
        first = first or table
        if (column in table.columns) != (column in first.columns):
            having, lacking = (table, first) if column in table.columns else (first, table)
            raise UsageError(
                f"task.data.{key}: '{column}' is a column of {having.name} and not of {lacking.name}; give it to every"
                f" file, or set task.data.{key}=null"
            )
        yield table


def local_table(path: Path, name: str | None = None) -> Table:
    """Open a table; `name` is what messages call it. Raises `UsageError` for one that cannot be read or has no rows.

    The columns of a file of JSON are the keys of all its rows: it is read once for them.
    """
    name = name or path.name
    with reading(name):
        if path.suffix.lower() == ".parquet":
            return _parquet_table(path, name)
        is_csv = ".csv" in path.name.lower()[-7:]
        lines = _csv_rows if is_csv else _json_rows
        rows = lines(path, name)
        first = next(rows, None)
        if first is None:
            raise UsageError(f"task.data.path: '{name}' has no rows")
        columns = dict.fromkeys(first)
        for row in () if is_csv else rows:
            columns.update(dict.fromkeys(row))

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        with reading(name):
            yield from ({column: row.get(column) for column in wanted} for row in lines(path, name))

    return Table(name=name, columns=list(columns), rows=read, folder=path.parent)


def hub_table(name: str, config: str | None, *, split: str, revision: str | None) -> Table:
    """Open a data set of the hub; its images and audio stay undecoded, so that what is broken is ours to name."""
    found = load_dataset(name, config, split=split, revision=revision)
    import datasets

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        chosen = found.select_columns(wanted)
        for column in wanted:
            if isinstance(chosen.features[column], datasets.Audio | datasets.Image):
                chosen = chosen.cast_column(column, type(chosen.features[column])(decode=False))
        return iter(chosen)

    classes = {key: kind.names for key, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(name=f"{name}/{split}", columns=found.column_names, rows=read, classes=classes)


def _parquet_table(path: Path, name: str) -> Table:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)

    def read(wanted: list[str]) -> Iterator[Mapping[str, Any]]:
        with reading(name), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                yield from batch.to_pylist()

    classes = _class_labels(schema.metadata or {})
    return Table(name=name, columns=schema.names, rows=read, folder=path.parent, classes=classes)


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names that `datasets` writes into a parquet file for its columns of classes."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    kinds = {key: kind for key, kind in features.items() if isinstance(kind, dict)}  # a list of kinds is no class
    return {key: kind["names"] for key, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def _opened(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _csv_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)  # a cell may hold a book
    with _opened(path) as lines:
        reader = csv.reader(lines, strict=True)  # or a quote that nobody closed would swallow the rest
        header = next(reader, [])
        if twice := [column for column in header if header.count(column) > 1]:
            raise UsageError(f"task.data.path: '{name}' has two columns '{twice[0]}'")
        for cells in reader:
            if cells and len(cells) != len(header):
                # Read on, the cells behind a comma that nobody quoted would be lost or stand in another column.
                raise UsageError(
                    f"task.data.path: '{name}' has {len(cells)} cells in line {reader.line_num} and {len(header)}"
                    " columns; quote cells that hold a comma"
                )
            if cells:
                yield dict(zip(header, cells, strict=True))


def _json_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with _opened(path) as lines:
        start = lines.read(1024).lstrip()[:1]
        lines.seek(0)
        rows = enumerate(json.loads(lines.read().lstrip("\ufeff"))) if start == "[" else _objects(lines, name)
        for number, row in rows:
            if not isinstance(row, dict):
                raise UsageError(f"task.data.path: row {number} of '{name}' is {type(row).__name__}, no object")
            yield row


def _objects(lines: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines):
        text = line.lstrip("\ufeff").strip()
        try:
            if text:
                yield number, json.loads(text)
        except ValueError as error:
            reason = first_line(error)
            raise UsageError(f"task.data.path: '{name}' cannot be read: line {number + 1}: {reason}") from error
