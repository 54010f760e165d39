"""The text of files and data sets as a stream of blocks, in an order that depends on nothing but the source."""

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.tasks.folders import TEST, TRAIN, VALIDATION, assign_parts, find_source, list_files
from moebench.tasks.sources import file_digest
from moebench.tasks.streams import COMPRESSED, open_text
from moebench.tasks.tables import TABLES, file_errors, open_table, read_rows
from moebench.tasks.text.document import Document, check_text
from moebench.tasks.text.prepared.blocks import Block, Position, choose_split, cut_text, read_parts
from moebench.tasks.text.prepared.options import BLOCK, SMALL_BLOCK, PrepareOptions, has_optional_domain
from moebench.tasks.text.sources import (
    OPTIONAL,
    TEXTS,
    TextDataConfig,
    from_hub,
    from_rows,
    from_table,
    refuse_saved_dataset,
    require_same_keys,
    text_file_domain,
)

ENDINGS = (*TABLES, *TEXTS)
PACKED_RATIO = 3
"""Assumed size of a compressed file's text, over that of the file; for the progress only."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a source, or a data set of the hub."""

    name: str
    path: Path | None
    """None for a data set of the hub."""
    part: str
    domain: str
    """Domain of a text file; a table has a column for it."""
    size: int = 0
    mtime_ns: int = 0


@dataclass
class Progress:
    """How much of a source was read, for the display."""

    num_bytes: int
    """Bytes of all files."""
    bytes_done: float = 0.0
    num_documents: int = 0


@dataclass
class CorpusSource:
    """The files of a source, in order, and how their documents are divided."""

    options: PrepareOptions
    files: list[SourceFile]
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(sum(file.size for file in self.files))

    @property
    def is_split_by_block(self) -> bool:
        """Whether blocks are documents of their own: where asked for, and where there is a single text file."""
        is_single_text = len(self.files) == 1 and self.files[0].name.lower().endswith(TEXTS)
        return self.options.split_by == "block" or (self.options.split_by == "document" and is_single_text)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the documents for each split that the source does not assign."""
        parts = {file.part for file in self.files}
        shares = {VALIDATION: self.options.validation, TEST: self.options.test}
        return {split: 0.0 if split in parts else share for split, share in shares.items()}

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and times of the files: what a run that continues compares."""
        return _digest([(file.name, file.size, file.mtime_ns) for file in self.files])

    def digest(self, is_stopped: Callable[[], bool] = lambda: False) -> str:
        """Return a SHA-256 (hex) of the names and contents of the files; of a data set of the hub, of its name.

        When `is_stopped` returns True, the files that are left are not read, and the result is not one.
        """
        is_single = len(self.files) == 1
        contents = [
            (file.name, "" if file.path is None or is_stopped() else file_digest(file.path)) for file in self.files
        ]
        return _digest([("" if is_single and self.files[0].path else name, content) for name, content in contents])

    def blocks(self, begin: Position) -> Iterator[Block]:
        """Yield the blocks after a position."""
        shares, size_before = self.shares, sum(file.size for file in self.files[: begin.file])
        domain_column: set[bool] = set()
        for number, file in enumerate(self.files[begin.file :], begin.file):
            skipped = begin.blocks if number == begin.file else 0
            text_bytes, ratio = 0, PACKED_RATIO if file.name.lower().endswith((*COMPRESSED, ".parquet")) else 1
            for index, (document, is_start, key) in enumerate(self._cut(self._documents(file, domain_column)), 1):
                text_bytes += len(document.text)
                self.progress.bytes_done = size_before + min(text_bytes / ratio, file.size)
                self.progress.num_documents += is_start
                if index > skipped:
                    yield Block(
                        text=document.text,
                        domain=document.domain,
                        split=choose_split(key, document.part, shares),
                        is_start=is_start,
                        end=Position(file=number, blocks=index),
                    )
            size_before += file.size

    def _documents(self, file: SourceFile, domain_column: set[bool]) -> Iterator[tuple[Document, bool, str]]:
        """Yield documents, or parts of one from the first, and the key by which each is divided, "" for its text."""
        data, key = self.options.data, f"file/{file.name}" if self.options.split_by == "file" else ""
        if file.name.lower().endswith(TEXTS) and file.path is not None:
            yield from ((part, is_first, key) for part, is_first in self._read_text(file, file.path))
            return
        documents = from_hub(data) if file.path is None else _read_table(file, file.path, data, domain_column)
        for document in documents:
            group = f"group/{document.group}" if data.group_column is not None else key
            yield replace(document, part=file.part), True, group

    def _read_text(self, file: SourceFile, path: Path) -> Iterator[tuple[Document, bool]]:
        with file_errors(file.name), open_text(path) as lines:
            for number, text in enumerate(read_parts(lines, SMALL_BLOCK if self.is_split_by_block else BLOCK)):
                check_text(text, f"'{file.name}'")
                yield Document(text=text, domain=file.domain, group="", part=file.part), number == 0

    def _cut(self, documents: Iterable[tuple[Document, bool, str]]) -> Iterator[tuple[Document, bool, str]]:
        """Cut documents into blocks; leave out blank ones, and what is blank before the first block of one."""
        size, key, has_begun = SMALL_BLOCK if self.is_split_by_block else BLOCK, "", False
        for document, is_first, given_key in documents:
            has_begun = has_begun and not is_first
            for text in cut_text(document.text, size):
                is_start = not has_begun or self.is_split_by_block
                if not text or (is_start and text.isspace()):
                    continue
                key = (given_key or f"text/{text}") if is_start else key
                has_begun = True
                yield replace(document, text=text), is_start, key


def open_source(options: PrepareOptions) -> CorpusSource:
    """Find the files of a source; raise UsageError for what does not exist or has no text."""
    if options.data.dataset is not None:
        return CorpusSource(options, [SourceFile(name=options.data.dataset, path=None, part=TRAIN, domain="")])
    paths = _find_files(options.sources)
    parts = assign_parts(paths, by_file=True) if len(paths) > 1 else {}
    has_domain = options.data.domain_column is not None and len(paths) > 1
    files = []
    for name in sorted(paths):
        with file_errors(name):
            state = paths[name].stat()
        domain = text_file_domain(name, is_divided=bool(parts)) if has_domain else "all"
        part = parts.get(name, TRAIN)
        files.append(
            SourceFile(
                name=name, path=paths[name], part=part, domain=domain, size=state.st_size, mtime_ns=state.st_mtime_ns
            )
        )
    return CorpusSource(options, files)


def _find_files(sources: Iterable[str]) -> dict[str, Path]:
    """Return the files by name: relative to their folder, below its own name if there are several sources."""
    roots = [root for source in sources for root in _expand(source)]
    files: dict[str, Path] = {}
    for root in roots:
        refuse_saved_dataset(root)
        is_below = root.is_dir() and len(roots) > 1
        listed = list_files(root, ENDINGS)
        if not listed:
            problem = "must end in" if root.is_file() else "has no file that ends in"
            raise UsageError(f"task.data.path: '{root}' {problem} {', '.join(ENDINGS)}")
        for name, path in listed.items():
            name = f"{root.name}/{name}" if is_below else name
            if name in files and files[name].resolve() != path.resolve():
                raise UsageError(f"task.data.path: two sources have a file '{name}'; give their common folder")
            files[name] = path
    return files


def _expand(source: str) -> list[Path]:
    if not Path(source).expanduser().exists() and glob.has_magic(source):
        matches = sorted(glob.glob(str(Path(source).expanduser()), recursive=True))
        if not matches:
            raise UsageError(f"task.data.path: no file matches '{source}'")
        return [Path(match) for match in matches]
    return [find_source(source)]


def _read_table(file: SourceFile, path: Path, data: TextDataConfig, domain_column: set[bool]) -> Iterator[Document]:
    if path.suffix.lower() == ".parquet":
        table = open_table(path, file.name)
        if has_optional_domain(data):
            _require_same(domain_column, OPTIONAL in table.columns, table.name)
        yield from from_table(table, data, first=0)
        return
    with file_errors(file.name):
        rows = ((f"{file.name}, row {number}", row) for number, row in enumerate(read_rows(path, file.name)))
        checked = _require_same_column(require_same_keys(rows), domain_column) if has_optional_domain(data) else rows
        yield from from_rows(checked, data, first=0)


def _require_same_column(
    rows: Iterable[tuple[str, Mapping[str, Any]]], domain_column: set[bool]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for location, row in rows:
        _require_same(domain_column, OPTIONAL in row, location)
        yield location, row


def _require_same(domain_column: set[bool], has_column: bool, location: str) -> None:
    """Raise UsageError if a table has a column of domains and an earlier one had none, or vice versa."""
    domain_column.add(has_column)
    if len(domain_column) > 1:
        raise UsageError(
            f"task.data.domain_column: some files have the column '{OPTIONAL}' and others have not (from {location});"
            " add it to every file, or give another column"
        )


def _digest(values: Iterable[tuple[Any, ...]]) -> str:
    return hashlib.sha256(repr(sorted(values)).encode()).hexdigest()
