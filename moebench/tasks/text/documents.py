"""Sources of text: the embedded pack, local files or the Hugging Face hub, each read into the same documents."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, nearest
from moebench.ranges import AT_LEAST_1, Range, check_ranges
from moebench.tasks import tables
from moebench.tasks.folders import TRAIN, assign_parts, find_source, folders_of, list_files
from moebench.tasks.sources import check_source, file_digest, first_line, load_dataset
from moebench.tasks.tables import TABLES, Table, file_errors, open_hub_table, open_table, read_name
from moebench.tasks.text.embedded_tokenizer import BPE
from moebench.tasks.text.pack import GROUP_COLUMN, PACKS, check_pack, embedded_group, mixed_order
from moebench.tasks.text.tokens import tokenizer_file

TEXTS = (".txt", ".txt.gz")
OPTIONAL = "domain"  # the default of `domain_column`: the only column that a source may lack


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """Which text to train on and how it is tokenized; by default seven embedded domains."""

    RANGES: ClassVar[Mapping[str, Range]] = {"max_bytes": AT_LEAST_1}

    pack: Literal["domains", "corpus"] = "domains"
    """Embedded text, without `path` and `dataset`: 'domains' (7 domains, 13.7 MB) or 'corpus' (28 domains, 198 MB)."""
    path: str | None = None
    """Local file or folder: .parquet, .jsonl, .json, .csv or .txt, also .gz. A .txt file is one document; in a folder
    of .txt files the domain is the subfolder, or else the name of the file without its ending. Folders or files named
    train, validation (val, valid, dev) and test are kept as splits."""
    made_by: str | None = None
    """Command that creates the file at `path`; error messages show it if the file does not exist."""
    dataset: str | None = None
    """Data set on the Hugging Face hub, instead of `path`."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read; it is divided again into train, validation and test."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    text_column: str = "text"
    """Column of the text."""
    domain_column: str | None = OPTIONAL
    """Column of the domain; if it is missing or null, all text is of one domain, 'all'."""
    group_column: str | None = None
    """Column of the group that is never divided between splits (author, book, site); null: each document is a group
    (the embedded pack has its own groups)."""
    held_out_domains: list[str] = field(default_factory=list)
    """Domains that are excluded from training and validation, and measured out of domain in the test split."""
    streaming: bool = False
    """Read only the first `max_bytes`, in the order of the source, without downloading or reading more."""
    max_bytes: int | None = None
    """Largest number of bytes of text (UTF-8) to use, divided equally among domains unless `streaming`; null: all."""
    remove_overlap: bool = True
    """Remove validation and test documents at least half of whose 13-grams of words are in the training split."""
    tokenizer: str = BPE
    """'bpe4096' (trained on the embedded text), 'bytes', a tokenizer.json, its folder, or a name on the hub."""

    def __post_init__(self) -> None:
        check_source(self, ("text_column", "domain_column", "group_column", "tokenizer"))
        if self.made_by and self.path is None and self.dataset is None:
            raise UsageError(f"task.data.path: null was given.{_creation_advice(self)}")
        check_ranges(self, "task.data")
        check_pack(self.pack, self.path, self.dataset)
        if self.streaming and self.max_bytes is None:
            raise UsageError("task.data.max_bytes: null was given; streaming needs a number of bytes")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with its domain and its group."""

    text: str
    domain: str
    group: str
    """Documents of one group are never divided between splits."""
    part: str = TRAIN
    """Split that the source assigns; train where it assigns none, and then divided further."""


def load_documents(config: TextDataConfig) -> list[Document]:
    """Return all documents of the source that are not blank; raise UsageError for what cannot be read."""
    key, name = ("dataset", config.dataset) if config.dataset else ("path", config.path or PACKS[config.pack].name)
    read: Iterable[Document] = (d for d in _documents(config) if not d.text.isspace() and d.text)
    if config.pack == "corpus" and config.max_bytes:
        read = sorted(read, key=lambda d: mixed_order(d.text))
    documents = _limit_bytes(read, config)
    if not documents:
        raise UsageError(f"task.data.{key}: '{name}' has no text; give a file with text with task.data.path=...")
    return documents


def source_digest(config: TextDataConfig) -> str:
    """Return a SHA-256 (hex) of the options and file contents that determine the data, independent of paths.

    A hub data set is identified by name, configuration, split and revision: pin a commit to identify its bytes.
    """
    fields = {
        name: getattr(config, name)
        for name in ("dataset", "config", "split", "revision", "text_column", "domain_column", "group_column")
    }
    fields |= {"streaming": config.streaming, "max_bytes": config.max_bytes, "pack": _is_pack(config)}
    fields["held_out_domains"] = sorted(config.held_out_domains)
    fields["remove_overlap"] = config.remove_overlap
    if config.dataset is None:
        files = _source_files(config)
        is_single_file = config.path is None or find_source(config.path).is_file()  # its name does not matter
        fields["files"] = [("" if is_single_file else name, file_digest(path)) for name, path in files.items()]
    tokenizer = tokenizer_file(config.tokenizer)
    fields["tokenizer"] = file_digest(tokenizer) if tokenizer else config.tokenizer
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _is_pack(config: TextDataConfig) -> bool:
    return config.path is None and config.dataset is None


def _documents(config: TextDataConfig) -> Iterator[Document]:
    if config.dataset is not None:
        yield from _from_hub(config)
        return
    files = _source_files(config)
    parts = assign_parts(files, by_file=True) if len(files) > 1 else {}
    if parts and config.streaming:
        raise UsageError(
            f"task.data.streaming: true was given, but the first part of '{config.path}' would use up max_bytes;"
            " allowed: false"
        )
    if next(iter(files)).lower().endswith(TEXTS):  # all have the same kind
        for name, path in files.items():
            yield _read_text_file(name, path, config, is_divided=bool(parts), part=parts.get(name, TRAIN))
        return
    opened = (open_table(path, name) for name, path in files.items())
    has_optional = config.domain_column == OPTIONAL
    num_documents = 0
    for table in tables.require_same_columns(opened, "domain_column", OPTIONAL) if has_optional else opened:
        for document in _from_table(table, config, num_documents):
            num_documents += 1
            yield replace(document, part=parts.get(table.name, TRAIN))


def _from_table(table: Table, config: TextDataConfig, first: int) -> Iterator[Document]:
    for key in ("text_column", "domain_column", "group_column"):
        column = getattr(config, key)
        if column is not None and (key, column) != ("domain_column", OPTIONAL):
            table.check(key, column)
    columns = (
        config.text_column,
        config.domain_column,
        config.group_column,
        *([GROUP_COLUMN[config.pack]] * _is_pack(config)),
    )
    yield from _from_rows(table.read(c for c in columns if c is not None and c in table.columns), config, first)


def _from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], config: TextDataConfig, first: int) -> Iterator[Document]:
    """Yield the documents of rows, which are numbered from `first`."""
    for number, (location, row) in enumerate(rows, first):
        text = _cell(row, "text_column", config.text_column, location)
        if not isinstance(text, str):
            kind = "empty (null)" if text is None else type(text).__name__
            raise UsageError(f"task.data.text_column: '{config.text_column}' of {location} is {kind}, not text")
        domain, group = "all", f"document/{number}"
        if config.domain_column is not None and (config.domain_column != OPTIONAL or OPTIONAL in row):
            cell = _cell(row, "domain_column", config.domain_column, location)
            domain = read_name(cell, "domain_column", config.domain_column, location)
        if config.group_column is not None:
            cell = _cell(row, "group_column", config.group_column, location)
            group = read_name(cell, "group_column", config.group_column, location)
        elif _is_pack(config):
            group = embedded_group(config.pack, row)
        yield Document(text=_check_text(text, location), domain=domain, group=group)


def _require_same_keys(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows of a stream; raise UsageError if only some have the column of domains."""
    first: tuple[str, Mapping[str, Any]] | None = None
    for location, row in rows:
        first = first or (location, row)
        if (OPTIONAL in row) != (OPTIONAL in first[1]):
            with_column, without = (location, first[0]) if OPTIONAL in row else (first[0], location)
            raise UsageError(
                f"task.data.domain_column: {with_column} has '{OPTIONAL}' and {without} has not; set it to null, or to"
                " a column that all rows have"
            )
        yield location, row


def _cell(row: Mapping[str, Any], key: str, column: str, location: str) -> Any:
    if column not in row:
        known = f"columns: {', '.join(row)}"
        raise UsageError(f"task.data.{key}: there is no column '{column}' in {location}.{nearest(column, row)} {known}")
    return row[column]


def _check_text(text: str, location: str) -> str:
    """Return the text; raise UsageError for signs of binary data: lone surrogates and NUL bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"task.data.path: the text of {location} has half a character (a lone surrogate)") from error
    if "\0" in text:
        raise UsageError(f"task.data.path: the text of {location} has NUL bytes: is it UTF-16, or not text? Convert it")
    return text


def _read_text_file(name: str, path: Path, config: TextDataConfig, *, is_divided: bool, part: str) -> Document:
    with file_errors(name):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    # A single file has no domain. In a folder, domains are subfolders, or else files.
    domain, folders = "all", folders_of(name, divided=is_divided)
    if config.domain_column is not None and path != find_source(config.path or ""):
        file_domain = "all" if is_divided and len(folders) == name.count("/") else name.rpartition("/")[2].split(".")[0]
        domain = folders[0] if folders else file_domain
    return Document(text=_check_text(text, f"'{name}'"), domain=domain, group=f"document/{name}", part=part)


def _from_hub(config: TextDataConfig) -> Iterator[Document]:
    assert config.dataset is not None
    options: dict[str, Any] = {"split": config.split, "revision": config.revision}
    try:
        if config.streaming:  # columns are unknown before the first row
            source = load_dataset(config.dataset, config.config, streaming=True, **options)
            rows = ((f"row {number}", row) for number, row in enumerate(source))
            checked = _require_same_keys(rows) if config.domain_column == OPTIONAL else rows
            yield from _from_rows(checked, config, first=0)
        else:
            yield from _from_table(open_hub_table(config.dataset, config.config, **options), config, first=0)
    except UsageError:
        raise
    except Exception as error:  # of many kinds, from the network and its libraries
        raise UsageError(
            f"task.data.dataset: '{config.dataset}' cannot be read ({first_line(error)}); check task.data.config, split"
            " and revision, or give local files with task.data.path=..."
        ) from error


def _creation_advice(config: TextDataConfig) -> str:
    return f" To create it: {' '.join(config.made_by.split())}" if config.made_by else ""


def _source_files(config: TextDataConfig) -> dict[str, Path]:
    """Return the files, all of one kind, by their path relative to the folder."""
    if config.path is None:
        return {PACKS[config.pack].name: PACKS[config.pack]}
    root = find_source(config.path, _creation_advice(config))
    endings = (*TABLES, *TEXTS)
    files = list_files(root, endings)
    if not files:
        problem = "must end in" if root.is_file() else "has no file that ends in"
        raise UsageError(f"task.data.path: '{config.path}' {problem} {', '.join(endings)}")
    kinds = sorted({next(ending for ending in endings if name.lower().endswith(ending)) for name in files})
    if len({kind.removesuffix(".gz") for kind in kinds}) > 1:
        raise UsageError(f"task.data.path: '{config.path}' mixes {', '.join(kinds)} files; keep one kind")
    return files


def _limit_bytes(documents: Iterable[Document], config: TextDataConfig) -> list[Document]:
    if config.max_bytes is None:
        return list(documents)
    if config.streaming:
        return list(_take(documents, config.max_bytes))
    documents_of: dict[str, list[Document]] = {}
    for document in documents:
        documents_of.setdefault(document.domain, []).append(document)
    share = config.max_bytes // max(1, len(documents_of))
    if documents_of and not share:
        given = f"{config.max_bytes} for {len(documents_of)} domains"
        raise UsageError(f"task.data.max_bytes: {given} is less than one byte each; give more")
    return [kept for members in documents_of.values() for kept in _take_from_parts(members, share)]


def _take_from_parts(members: Sequence[Document], budget: int) -> Iterator[Document]:
    """Yield documents up to `budget` bytes, with the same share of every part, so that each part keeps some."""
    size: Counter[str] = Counter()
    for document in members:
        size[document.part] += len(document.text.encode())
    for part, part_bytes in size.items():
        part_budget = budget * part_bytes // size.total()
        yield from _take((document for document in members if document.part == part), part_budget)


def _take(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    for document in documents:
        data = document.text.encode()
        if len(data) >= budget:  # cut the last document between characters
            text = data[:budget].decode(errors="ignore")
            if text:
                yield replace(document, text=text)
            return
        budget -= len(data)
        yield document
