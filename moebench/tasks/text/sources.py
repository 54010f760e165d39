"""Sources of text: the embedded pack, local files or the Hugging Face hub, each read into the same documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, suggest
from moebench.ranges import AT_LEAST_1, Range, check_ranges
from moebench.tasks import tables
from moebench.tasks.folders import TRAIN, assign_parts, find_source, list_files, list_parent_folders
from moebench.tasks.sources import check_source, file_digest, first_line, load_dataset
from moebench.tasks.streams import COMPRESSED, find_uncompressed_ending, read_whole_text
from moebench.tasks.tables import TABLES, Table, file_errors, open_hub_table, open_table, read_name
from moebench.tasks.text.document import Document, check_text
from moebench.tasks.text.embedded_tokenizer import BPE
from moebench.tasks.text.limits import limit_bytes
from moebench.tasks.text.pack import GROUP_COLUMN, PACKS, check_pack, find_embedded_group, make_mixing_key
from moebench.tasks.text.tokens import tokenizer_file

TEXTS = (".txt", *(f".txt{packed}" for packed in COMPRESSED))
OPTIONAL = "domain"
"""Default of `domain_column`: the only column that a source may lack."""


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """Which text to train on and how it is tokenized; by default seven embedded domains."""

    RANGES: ClassVar[Mapping[str, Range]] = {"max_bytes": AT_LEAST_1}

    pack: Literal["domains", "corpus"] = "domains"
    """Embedded text, without `path` and `dataset`: 'domains' (7 domains, 13.7 MB; of 109 validation and test documents
    0 are removed for overlap) or 'corpus' (28 domains, 198 MB; 13 of 4,583)."""
    path: str | None = None
    """Local file or folder: .parquet, .jsonl, .json, .csv or .txt, also .gz and .zst, or a folder of `moebench
    prepare`. A .txt file is one document; in a folder of .txt files the domain is the subfolder, or else the name of
    the file without its ending. Folders or files named train, validation (val, valid, dev) and test are kept as
    splits."""
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
    """Maximum number of bytes of text (UTF-8) to use, divided equally among domains unless `streaming`; null: all."""
    remove_overlap: bool = True
    """Remove validation and test documents that share at least half of their 13-grams of words with the training split;
    a folder of `moebench prepare` has its own `--keep-overlap`."""
    tokenizer: str = BPE
    """'bpe4096' (trained on the embedded text), 'bytes', a tokenizer.json, its folder, or a name on the hub."""
    mask_documents: bool = False
    """Let attention stay inside the documents of a window, which begin with a separator. Positions do not restart:
    rotary attention sees only their differences."""

    def __post_init__(self) -> None:
        check_source(self, ("text_column", "domain_column", "group_column", "tokenizer"))
        if self.made_by and self.path is None and self.dataset is None:
            raise UsageError(f"task.data.path: null was given.{_creation_advice(self)}")
        check_ranges(self, "task.data")
        check_pack(self.pack, self.path, self.dataset)
        if self.streaming and self.max_bytes is None:
            raise UsageError("task.data.max_bytes: null was given; streaming needs a number of bytes")


def load_documents(config: TextDataConfig) -> list[Document]:
    """Return all documents of the source that are not blank; raise UsageError for what cannot be read."""
    key, name = ("dataset", config.dataset) if config.dataset else ("path", config.path or PACKS[config.pack].name)
    read: Iterable[Document] = (d for d in _documents(config) if not d.text.isspace() and d.text)
    if config.pack == "corpus" and config.max_bytes:
        read = sorted(read, key=lambda d: make_mixing_key(d.text))
    documents = limit_bytes(read, config.max_bytes, is_stream=config.streaming)
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
        yield from from_hub(config)
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
        for document in from_table(table, config, num_documents):
            num_documents += 1
            yield replace(document, part=parts.get(table.name, TRAIN))


def from_table(table: Table, config: TextDataConfig, first: int) -> Iterator[Document]:
    """Yield the documents of a table, which are numbered from `first`."""
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
    yield from from_rows(table.read(c for c in columns if c is not None and c in table.columns), config, first)


def from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], config: TextDataConfig, first: int) -> Iterator[Document]:
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
            group = find_embedded_group(config.pack, row)
        yield Document(text=check_text(text, location), domain=domain, group=group)


def require_same_keys(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
        raise UsageError(f"task.data.{key}: there is no column '{column}' in {location}.{suggest(column, row)} {known}")
    return row[column]


def _read_text_file(name: str, path: Path, config: TextDataConfig, *, is_divided: bool, part: str) -> Document:
    with file_errors(name):
        text = read_whole_text(path, name)
    has_domain = config.domain_column is not None and path != find_source(config.path or "")
    domain = text_file_domain(name, is_divided=is_divided) if has_domain else "all"
    return Document(text=check_text(text, f"'{name}'"), domain=domain, group=f"document/{name}", part=part)


def text_file_domain(name: str, *, is_divided: bool) -> str:
    """Return the domain of a text file of a folder: its subfolder, or else its name without the endings."""
    folders = list_parent_folders(name, divided=is_divided)
    if folders:
        return folders[0]
    names_part = is_divided and "/" not in name
    return "all" if names_part else name.rsplit("/", 1)[-1].split(".")[0]


def from_hub(config: TextDataConfig) -> Iterator[Document]:
    """Yield the documents of a data set of the hub."""
    assert config.dataset is not None
    options: dict[str, Any] = {"split": config.split, "revision": config.revision}
    try:
        if config.streaming:  # columns are unknown before the first row
            source = load_dataset(config.dataset, config.config, streaming=True, **options)
            rows = ((f"row {number}", row) for number, row in enumerate(source))
            checked = require_same_keys(rows) if config.domain_column == OPTIONAL else rows
            yield from from_rows(checked, config, first=0)
        else:
            yield from from_table(open_hub_table(config.dataset, config.config, **options), config, first=0)
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
    refuse_saved_dataset(root)
    files = list_files(root, endings)
    if not files:
        problem = "must end in" if root.is_file() else "has no file that ends in"
        raise UsageError(f"task.data.path: '{config.path}' {problem} {', '.join(endings)}")
    kinds = sorted({next(ending for ending in endings if name.lower().endswith(ending)) for name in files})
    if len({find_uncompressed_ending(f"a{kind}") for kind in kinds}) > 1:
        raise UsageError(
            f"task.data.path: '{config.path}' mixes {', '.join(kinds)} files; keep one kind, or give what"
            " `moebench prepare` makes of it"
        )
    return files


def refuse_saved_dataset(root: Path) -> None:
    """Raise UsageError for a folder that the library `datasets` wrote by `save_to_disk`."""
    if any((root / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise UsageError(
            f"task.data.path: '{root}' was written by save_to_disk of the library datasets; allowed: its splits as"
            " parquet (load_from_disk(...)['train'].to_parquet('train.parquet')), or other"
            f" {', '.join((*TABLES, *TEXTS))} files"
        )
