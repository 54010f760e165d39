"""Tables of named columns: parquet, CSV and JSON files and data sets of the hub, with one interface."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moebench.errors import UsageError, suggest
from moebench.tasks.sources import first_line, load_dataset
from moebench.tasks.streams import (
    COMPRESSED,
    LONGEST_ROW,
    find_uncompressed_ending,
    open_text,
    read_json_array,
    read_lines,
)

TABLES = (".parquet", *(f"{kind}{packed}" for kind in (".csv", ".jsonl", ".json") for packed in ("", *COMPRESSED)))

NESTED = {"data", "rows", "items", "examples", "train"}
"""Keys under which a JSON object may hold the rows."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A source of rows with named columns."""

    name: str
    columns: Sequence[str]
    rows: Callable[[list[str]], Iterator[Mapping[str, Any]]]
    """Yields the rows, restricted to the given columns; missing values are None."""
    folder: Path = Path()
    """Folder that paths in cells are relative to."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> class names, for columns of class indices as data sets of the hub have."""

    def check(self, key: str, column: str) -> None:
        """Raise UsageError with the existing columns if `column`, the value of task.data.`key`, is not one of them."""
        if column not in self.columns:
            known = f"columns of {self.name}: {', '.join(self.columns)}"
            raise UsageError(f"task.data.{key}: there is no column '{column}'.{suggest(column, self.columns)} {known}")

    def read(self, columns: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location of each row, for messages, and its cells, with class names in place of class indices."""
        columns = list(dict.fromkeys(columns))
        class_columns = [column for column in columns if column in self.classes]
        for number, row in enumerate(self.rows(columns)):
            classes = {column: self._class_name(column, row[column]) for column in class_columns}
            yield f"{self.name}, row {number}", {**row, **classes}

    def _class_name(self, column: str, value: Any) -> Any:
        names = self.classes[column]
        if not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None  # -1 marks unlabelled rows


def read_name(value: Any, key: str, column: str, location: str) -> str:
    """Return a cell that holds a name, as text; raise UsageError if it is empty or neither text nor a number."""
    if isinstance(value, str | int | float) and value == value and value != "":
        return str(value)
    kind = "empty" if value in (None, "") or value != value else type(value).__name__
    raise UsageError(f"task.data.{key}: '{column}' of {location} is {kind}, not a name or number")


def read_content(value: Any, folder: Path) -> Any:
    """Return the content of a cell, or the path that it names, which may be relative to the folder of the table.

    Raises UsageError for a path to a pipe, a device or a folder: reading one may never end.
    """
    if isinstance(value, Mapping):  # the format of images and audio on the hub
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str) or not value:
        return value
    path = folder / Path(value).expanduser()
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"task.data.path: '{value}', which a table names, is not a plain file")
    return path


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn exceptions while a file is read into a UsageError of one line that names the file."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeError as error:
        raise UsageError(
            f"task.data.path: '{name}' cannot be read: it is not UTF-8 ({first_line(error)}); convert it, for example"
            " with iconv -f LATIN1 -t UTF-8"
        ) from error
    except Exception as error:  # of many kinds, from the readers of four formats
        raise UsageError(
            f"task.data.path: '{name}' cannot be read ({first_line(error)}); give a complete file with"
            " task.data.path=..."
        ) from error


def require_same_columns(tables: Iterable[Table], key: str, column: str) -> Iterator[Table]:
    """Yield the tables; raise UsageError if only some have the optional `column`, the value of task.data.`key`.

    Otherwise the rows of tables without it would silently form their own domain.
    """
    first: Table | None = None
    for table in tables:
        first = first or table
        if (column in table.columns) != (column in first.columns):
            with_column, without = (table, first) if column in table.columns else (first, table)
            raise UsageError(
                f"task.data.{key}: '{column}' is a column of {with_column.name} and not of {without.name}; add it to"
                f" every file, or set task.data.{key}=null"
            )
        yield table


def open_table(path: Path, name: str | None = None) -> Table:
    """Open a local table, which messages call `name`; raise UsageError if it cannot be read or has no rows.

    The columns of a JSON file are the keys of all its rows, so the file is read once for them.
    """
    name = name or path.name
    with file_errors(name):
        if path.suffix.lower() == ".parquet":
            return _parquet_table(path, name)
        is_csv = find_uncompressed_ending(path.name) == ".csv"
        rows = read_rows(path, name)
        first = next(rows, None)
        if first is None:
            raise UsageError(f"task.data.path: '{name}' has no rows")
        known_columns = dict.fromkeys(first)
        for row in () if is_csv else rows:
            known_columns.update(dict.fromkeys(row))

    def read(columns: list[str]) -> Iterator[Mapping[str, Any]]:
        with file_errors(name):
            yield from ({column: row.get(column) for column in columns} for row in read_rows(path, name))

    return Table(name=name, columns=list(known_columns), rows=read, folder=path.parent)


def read_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or JSON file, one at a time; wrap it in `file_errors`."""
    return _csv_rows(path, name) if find_uncompressed_ending(path.name) == ".csv" else _json_rows(path, name)


def open_hub_table(name: str, config: str | None, *, split: str, revision: str | None) -> Table:
    """Open a data set of the hub; images and audio stay encoded, so that errors in them can name the row."""
    dataset = load_dataset(name, config, split=split, revision=revision)
    import datasets

    def read(columns: list[str]) -> Iterator[Mapping[str, Any]]:
        selected = dataset.select_columns(columns)
        for column in columns:
            if isinstance(selected.features[column], datasets.Audio | datasets.Image):
                selected = selected.cast_column(column, type(selected.features[column])(decode=False))
        return iter(selected)

    classes = {key: kind.names for key, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(name=f"{name}/{split}", columns=dataset.column_names, rows=read, classes=classes)


def _parquet_table(path: Path, name: str) -> Table:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)

    def read(columns: list[str]) -> Iterator[Mapping[str, Any]]:
        with file_errors(name), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from batch.to_pylist()

    classes = _class_labels(schema.metadata or {})
    return Table(name=name, columns=schema.names, rows=read, folder=path.parent, classes=classes)


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the class names of each column of class indices, which `datasets` writes into the metadata of parquet."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    kinds = {key: kind for key, kind in features.items() if isinstance(kind, dict)}  # a list is a nested feature
    return {key: kind["names"] for key, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def _csv_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_ROW)  # a cell may be a whole book
    with open_text(path) as lines:
        reader = csv.reader(read_lines(lines, name), strict=True)  # an unclosed quote is an error
        header = next(reader, [])
        if duplicates := [column for column in header if header.count(column) > 1]:
            raise UsageError(f"task.data.path: '{name}' has two columns '{duplicates[0]}'")
        for cells in reader:
            if cells and len(cells) != len(header):
                # With an unquoted comma, cells would be dropped or read as another column.
                raise UsageError(
                    f"task.data.path: '{name}' has {len(cells)} cells in line {reader.line_num} and {len(header)}"
                    " columns; quote cells that hold a comma"
                )
            if cells:
                yield dict(zip(header, cells, strict=True))


def _json_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        start = file.read(1024).lstrip("\ufeff \t\r\n")[:1]
    with open_text(path) as file:
        rows = enumerate(read_json_array(file, name)) if start == "[" else _json_lines(file, name)
        for number, row in rows:
            if not isinstance(row, dict):
                raise UsageError(f"task.data.path: row {number} of '{name}' is {type(row).__name__}, not an object")
            _refuse_nested_rows(row, name)
            yield row


def _json_lines(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_lines(file, name)):
        text = line.lstrip("\ufeff").strip()
        try:
            if text:
                yield number, json.loads(text)
        except ValueError as error:
            if number == 0 and text.startswith("{") and find_uncompressed_ending(name) == ".json":
                raise UsageError(
                    f"task.data.path: '{name}' is one object over several lines; allowed: an array of rows, or one row"
                    " a line (jq -c '.data[]' takes them out of a key)"
                ) from error
            reason = first_line(error)
            raise UsageError(f"task.data.path: '{name}' cannot be read: line {number + 1}: {reason}") from error


def _refuse_nested_rows(row: Mapping[str, Any], name: str) -> None:
    """Raise UsageError for an object that holds the rows, as data sets in one JSON object do."""
    for key in NESTED & row.keys() if len(row) <= 3 else ():
        if isinstance(row[key], list) and row[key] and isinstance(row[key][0], dict):
            raise UsageError(
                f"task.data.path: '{name}' has its rows under the key '{key}'; allowed: an array of rows, or one row a"
                f" line (jq -c '.{key}[]' takes them out)"
            )
