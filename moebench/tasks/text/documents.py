"""Where text comes from: the embedded pack, local files or a hub, each read into the same documents."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, nearest
from moebench.tasks.folders import TRAIN, existing, files_below, folders_of, parts_of
from moebench.tasks.sources import check_source, file_digest, first_line, load_dataset
from moebench.tasks.tables import TABLES, Table, hub_table, local_table, named, reading, require_alike
from moebench.tasks.text.pack import PACK, pack_group

TEXTS = (".txt", ".txt.gz")
OPTIONAL = "domain"
"""The column of domains that a source may lack: the default of `domain_column`."""


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """Which text to train on and how it becomes tokens; by default seven domains that moebench carries."""

    path: str | None = None
    """Local file or folder: .parquet, .jsonl, .json, .csv or .txt, also .gz. A .txt file is one document; in a folder
    of .txt files the domain is the subfolder, or else the file's name without its ending. What lies in folders, or
    in files, called train, validation (val, valid, dev) and test is not mixed."""
    made_by: str | None = None
    """How the file at `path` is made, where moebench does not carry it: said when it is not there."""
    dataset: str | None = None
    """Name of a data set on the Hugging Face hub, used instead of `path`."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read; it is divided again into train, validation and test."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    text_column: str = "text"
    """Column that holds the text."""
    domain_column: str | None = OPTIONAL
    """Column that names the domain; without such a column, or with null, all text is one domain, 'all'."""
    group_column: str | None = None
    """Column of the group that may not be divided between train and test (author, book, site);
    null keeps each document by itself (the embedded pack brings its own groups)."""
    held_out_domains: list[str] = field(default_factory=list)
    """Domains that are in no training batch and not in the validation set: the test measures them out of domain."""
    streaming: bool = False
    """Read while downloading, or a large local file only up to `max_bytes`, in the order of the source."""
    max_bytes: int | None = None
    """Bytes of text (UTF-8) to read at most; equal parts of it for each domain unless `streaming`."""
    tokenizer: str = "bytes"
    """'bytes', the path of a tokenizer.json or of its folder, or the name of a tokenizer on the hub."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        check_source(self, ("text_column", "domain_column", "group_column", "tokenizer"))
        if self.made_by and self.path is None and self.dataset is None:
            raise UsageError(f"task.data.path: null was given.{_how_to_make(self)}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UsageError(f"task.data.max_bytes: {self.max_bytes} was given; allowed: at least 1, or null")
        if self.streaming and self.max_bytes is None:
            raise UsageError("task.data.max_bytes: null was given; streaming needs a number of bytes")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, the domain it belongs to and the group it may not be parted from."""

    text: str
    domain: str
    group: str
    part: str = TRAIN
    """validation or test where the source keeps them apart from what is trained on, or divided."""


def load_documents(config: TextDataConfig) -> list[Document]:
    """Read all documents of the source, blank ones left out; raise `UsageError` for what cannot be read."""
    key, name = ("dataset", config.dataset) if config.dataset else ("path", config.path or PACK.name)
    documents = _within_budget((d for d in _documents(config) if not d.text.isspace() and d.text), config)
    if not documents:
        raise UsageError(f"task.data.{key}: '{name}' holds no text; give task.data.path=... a file with text")
    return documents


def source_digest(config: TextDataConfig) -> str:
    """Return a cheap SHA-256 (hex) of what decides the content: file bytes and fields, never where files lie.

    A hub data set counts by name, configuration, split and revision: pin a commit to identify its bytes.
    """
    fields = {
        name: getattr(config, name)
        for name in ("dataset", "config", "split", "revision", "text_column", "domain_column", "group_column")
    }
    fields |= {"streaming": config.streaming, "max_bytes": config.max_bytes, "pack": _is_pack(config)}
    fields["held_out_domains"] = sorted(config.held_out_domains)
    if config.dataset is None:
        files = _source_files(config)
        is_alone = config.path is None or existing(config.path).is_file()  # then its name says nothing
        fields["files"] = [("" if is_alone else name, file_digest(path)) for name, path in files.items()]
    tokenizer = tokenizer_file(config.tokenizer)
    fields["tokenizer"] = file_digest(tokenizer) if tokenizer else config.tokenizer
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json that a name means, or None for 'bytes' and for a name on the hub."""
    if name == "bytes":
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"task.data.tokenizer: the folder '{name}' holds no tokenizer.json")
    if path.is_file():
        return path
    if path.suffix == ".json" or path.is_absolute():
        raise UsageError(
            f"task.data.tokenizer: '{name}' does not exist; allowed: 'bytes', a tokenizer.json, a hub name"
        )
    return None


def _is_pack(config: TextDataConfig) -> bool:
    return config.path is None and config.dataset is None


def _documents(config: TextDataConfig) -> Iterator[Document]:
    if config.dataset is not None:
        yield from _from_hub(config)
        return
    files = _source_files(config)
    parts = parts_of(files, by_file=True) if len(files) > 1 else {}
    if parts and config.streaming:
        raise UsageError(
            f"task.data.streaming: true was given, and '{config.path}' has parts, of which one would use up max_bytes;"
            " allowed: false"
        )
    if next(iter(files)).lower().endswith(TEXTS):  # all are of one kind
        for name, path in files.items():
            yield _from_text_file(name, path, config, is_divided=bool(parts), part=parts.get(name, TRAIN))
        return
    tables = (local_table(path, name) for name, path in files.items())
    first = 0
    for table in require_alike(tables, "domain_column", OPTIONAL) if config.domain_column == OPTIONAL else tables:
        for document in _from_table(table, config, first):
            first += 1
            yield replace(document, part=parts.get(table.name, TRAIN))


def _from_table(table: Table, config: TextDataConfig, first: int) -> Iterator[Document]:
    for key in ("text_column", "domain_column", "group_column"):
        column = getattr(config, key)
        if column is not None and (key, column) != ("domain_column", OPTIONAL):
            table.check(key, column)
    wanted = (config.text_column, config.domain_column, config.group_column, *(["doc_id"] * _is_pack(config)))
    yield from _from_rows(table.read(c for c in wanted if c is not None and c in table.columns), config, first)


def _from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], config: TextDataConfig, first: int) -> Iterator[Document]:
    """Yield the documents of rows, which count on from `first`."""
    for number, (place, row) in enumerate(rows, first):
        text = _cell(row, "text_column", config.text_column, place)
        if not isinstance(text, str):
            kind = "empty (null)" if text is None else type(text).__name__
            raise UsageError(f"task.data.text_column: '{config.text_column}' of {place} is {kind}, not text")
        domain, group = "all", f"document/{number}"
        if config.domain_column is not None and (config.domain_column != OPTIONAL or OPTIONAL in row):
            cell = _cell(row, "domain_column", config.domain_column, place)
            domain = named(cell, "domain_column", config.domain_column, place)
        if config.group_column is not None:
            cell = _cell(row, "group_column", config.group_column, place)
            group = named(cell, "group_column", config.group_column, place)
        elif _is_pack(config):
            group = pack_group(row["domain"], row["doc_id"])
        yield Document(text=_whole(text, place), domain=domain, group=group)


def _require_alike(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows that nobody has seen all of; raise `UsageError` where only some have the column of domains."""
    first: tuple[str, Mapping[str, Any]] | None = None
    for place, row in rows:
        first = first or (place, row)
        if (OPTIONAL in row) != (OPTIONAL in first[1]):
            having, lacking = (place, first[0]) if OPTIONAL in row else (first[0], place)
            raise UsageError(
                f"task.data.domain_column: {having} has '{OPTIONAL}' and {lacking} has not; set it to null, or to a"
                " column that all rows have"
            )
        yield place, row


def _cell(row: Mapping[str, Any], key: str, column: str, place: str) -> Any:
    if column not in row:
        known = f"columns: {', '.join(row)}"
        raise UsageError(f"task.data.{key}: there is no column '{column}' in {place}.{nearest(column, row)} {known}")
    return row[column]


def _whole(text: str, place: str) -> str:
    """Return a text; raise `UsageError` for one that is none: other bytes that happened to be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"task.data.path: the text of {place} has half a character (a lone surrogate)") from error
    if "\0" in text:
        raise UsageError(f"task.data.path: the text of {place} has NUL bytes: is it UTF-16, or no text? Convert it")
    return text


def _from_text_file(name: str, path: Path, config: TextDataConfig, *, is_divided: bool, part: str) -> Document:
    with reading(name):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    # A file alone has no domain. A folder's files are their own domains, unless subfolders say better.
    domain, folders = "all", folders_of(name, divided=is_divided)
    if config.domain_column is not None and path != existing(config.path or ""):
        own = "all" if is_divided and len(folders) == name.count("/") else path.name.split(".")[0]
        domain = folders[0] if folders else own
    return Document(text=_whole(text, f"'{name}'"), domain=domain, group=f"document/{name}", part=part)


def _from_hub(config: TextDataConfig) -> Iterator[Document]:
    assert config.dataset is not None
    options: dict[str, Any] = {"split": config.split, "revision": config.revision}
    try:
        if config.streaming:  # what columns there are is not known before the first row
            source = load_dataset(config.dataset, config.config, streaming=True, **options)
            rows = ((f"row {number}", row) for number, row in enumerate(source))
            yield from _from_rows(_require_alike(rows) if config.domain_column == OPTIONAL else rows, config, first=0)
        else:
            yield from _from_table(hub_table(config.dataset, config.config, **options), config, first=0)
    except UsageError:
        raise
    except Exception as error:  # a network raises almost anything
        raise UsageError(
            f"task.data.dataset: '{config.dataset}' cannot be read ({first_line(error)}); check task.data.config, split"
            " and revision, or give local files with task.data.path=..."
        ) from error


def _how_to_make(config: TextDataConfig) -> str:
    return f" Make it: {' '.join(config.made_by.split())}" if config.made_by else ""


def _source_files(config: TextDataConfig) -> dict[str, Path]:
    """Return the files by their name inside the folder, all of one kind."""
    if config.path is None:
        return {PACK.name: PACK}
    root = existing(config.path, _how_to_make(config))
    endings = (*TABLES, *TEXTS)
    files = files_below(root, endings)
    if not files:
        what = "must end in" if root.is_file() else "holds no file that ends in"
        raise UsageError(f"task.data.path: '{config.path}' {what} {', '.join(endings)}")
    kinds = sorted({next(ending for ending in endings if name.lower().endswith(ending)) for name in files})
    if len({kind.removesuffix(".gz") for kind in kinds}) > 1:
        raise UsageError(f"task.data.path: '{config.path}' mixes {', '.join(kinds)} files; keep one kind")
    return files


def _within_budget(documents: Iterable[Document], config: TextDataConfig) -> list[Document]:
    if config.max_bytes is None:
        return list(documents)
    if config.streaming:
        return list(_take(documents, config.max_bytes))
    average_by_domain: dict[str, list[Document]] = {}
    for document in documents:
        average_by_domain.setdefault(document.domain, []).append(document)
    share = config.max_bytes // max(1, len(average_by_domain))
    if average_by_domain and not share:
        given = f"{config.max_bytes} for {len(average_by_domain)} domains"
        raise UsageError(f"task.data.max_bytes: {given} is less than a byte for each; give more")
    return [kept for members in average_by_domain.values() for kept in _share(members, share)]


def _share(members: Sequence[Document], budget: int) -> Iterator[Document]:
    """Yield documents up to the budget, of which each part gets its share: a large test set leaves some to train on."""
    size: Counter[str] = Counter()
    for document in members:
        size[document.part] += len(document.text.encode())
    for part, own in size.items():
        yield from _take((document for document in members if document.part == part), budget * own // size.total())


def _take(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    for document in documents:
        data = document.text.encode()
        if len(data) >= budget:  # the last document is cut, never inside a character
            text = data[:budget].decode(errors="ignore")
            if text:
                yield replace(document, text=text)
            return
        budget -= len(data)
        yield document
