"""Text of files, compressed or not, read in pieces of bounded size: a small file may unpack to any length."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from moebench.errors import UsageError

COMPRESSED = (".gz", ".zst")
LONGEST_ROW = 1 << 27
"""Characters of one line of a CSV or JSONL file, of one row of a JSON array, or of one cell."""
LONGEST_FILE = 1 << 28
"""Characters of a text file that is read into memory as one document; `moebench prepare` reads longer ones."""
CHUNK = 1 << 20


def open_text(path: Path) -> TextIO:
    """Open a file as UTF-8 text without changing its line ends; what it is compressed with is known by its ending."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    if ending == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.TextIOWrapper(io.BufferedReader(stream, CHUNK), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def find_uncompressed_ending(name: str) -> str:
    """Return the ending of a file in lower case, without that of its compression."""
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def read_whole_text(path: Path, name: str) -> str:
    """Return the text of a file; raise UsageError if it is longer than `LONGEST_FILE`."""
    with open_text(path) as file:
        text = file.read(LONGEST_FILE + 1)
    if len(text) > LONGEST_FILE:
        raise UsageError(
            f"task.data.path: '{name}' has more than {LONGEST_FILE >> 20} MiB of text in one file; allowed: what"
            " `moebench prepare` made of it (docs/tasks.md, Prepared data)"
        )
    return text


def read_lines(file: TextIO, name: str) -> Iterator[str]:
    """Yield the lines of a file; raise UsageError for one of more than `LONGEST_ROW` characters."""
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise UsageError(_too_long(name, f"line {number}"))
        yield line


def read_json_array(file: TextIO, name: str) -> Iterator[Any]:
    """Yield the items of a JSON array, keeping one at a time in memory; raise ValueError if it is none.

    Raises UsageError for an item of more than `LONGEST_ROW` characters.
    """
    decoder, text, is_last, number = json.JSONDecoder(), file.read(CHUNK).lstrip("\ufeff \t\r\n"), False, 0
    text = text.removeprefix("[").lstrip()
    needs_comma = False
    while True:
        if not text and not is_last:
            text, is_last = _read_more(file, text)
            continue
        if text.startswith("]"):
            _require_end(text[1:] + file.read(CHUNK))
            return
        start = _skip_comma(text) if needs_comma else 0
        try:
            item, end = decoder.raw_decode(text, start)
        except ValueError:
            if is_last:
                raise
            if len(text) > LONGEST_ROW:
                raise UsageError(_too_long(name, f"row {number}")) from None
            text, is_last = _read_more(file, text)
            continue
        yield item
        number += 1
        needs_comma, text = True, text[end:].lstrip()


def _read_more(file: TextIO, text: str) -> tuple[str, bool]:
    """Return the text with as much again of the file, and whether that was the last of it."""
    more = file.read(max(CHUNK, len(text)))
    return (text + more if text else more.lstrip()), not more


def _skip_comma(text: str) -> int:
    if not text.startswith(","):
        raise ValueError("',' or ']' is missing after a row")
    return len(text) - len(text[1:].lstrip())


def _require_end(text: str) -> None:
    if text.strip():
        raise ValueError("there is text after the array")


def _too_long(name: str, place: str) -> str:
    return (
        f"task.data.path: {place} of '{name}' has more than {LONGEST_ROW >> 20} MiB of text; allowed: documents of at"
        " most that size"
    )
