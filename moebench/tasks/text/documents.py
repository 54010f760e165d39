"""Where text comes from: the embedded pack, local files or a hub, each read into the same documents."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, nearest
from moebench.tasks.sources import check_source, file_digest, first_line, load_dataset

PACK = Path(__file__).parent.parent / "data" / "text_domains.parquet"
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
# Scripture retells itself: these books share long passages and must not be told apart.
SCRIPTURE = {
    **dict.fromkeys(("Samuel", "Kings", "Chronicles", "Isaiah"), "Samuel+Kings+Chronicles+Isaiah"),
    **dict.fromkeys(("Matthew", "Mark", "Luke"), "Matthew+Mark+Luke"),
    **dict.fromkeys(("Ezra", "Nehemiah"), "Ezra+Nehemiah"),
}


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """Which text to train on and how it becomes tokens; by default seven domains that moebench carries."""

    path: str | None = None
    """Local file or folder: .parquet, .jsonl, .json, .csv or .txt, also .gz. A .txt file is one document;
    in a folder of .txt files the domain is the subfolder, or else the file's name without its ending."""
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
    domain_column: str | None = "domain"
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


def load_documents(config: TextDataConfig) -> list[Document]:
    """Read all documents of the source, empty ones left out; raise `UsageError` for what cannot be read."""
    key, name = ("dataset", config.dataset) if config.dataset else ("path", config.path or PACK.name)
    try:
        documents = _within_budget((d for d in _documents(config) if d.text), config)
    except UsageError:
        raise
    except Exception as error:  # the readers of four formats and a network raise almost anything
        advice = (
            "check task.data.config, split and revision, or give local files with task.data.path=..."
            if config.dataset
            else "give task.data.path=... a whole .parquet, .jsonl, .json, .csv or .txt file"
        )
        raise UsageError(f"task.data.{key}: '{name}' cannot be read ({first_line(error)}); {advice}") from error
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
        fields["files"] = [(name, file_digest(path)) for name, path in _source_files(config).items()]
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


def pack_group(domain: str, doc_id: str) -> str:
    """Return the group of a document of the embedded pack: what would leak if it were divided."""
    if domain in ("code", "docs"):  # the documentation of a module quotes the module
        name = doc_id.split("/")[0] if domain == "code" else doc_id.rsplit("/", 1)[-1]
        module = re.match(r"[A-Za-z_]\w*", name)
        return f"python/{module.group() if module else name}"
    if domain == "speeches":  # 1995_william_j_clinton_d -> william_j_clinton
        return f"speeches/{'_'.join(doc_id.split('_')[1:-1])}"
    if domain == "novels":  # austen-Emma-011 -> austen-Emma, moby-chapter_36 -> moby
        return f"novels/{'moby' if doc_id.startswith('moby') else doc_id.rpartition('-')[0]}"
    if domain == "scripture":  # kjv-2Kings -> Kings
        book = doc_id.removeprefix("kjv-")
        return f"scripture/{SCRIPTURE.get(book.lstrip('123'), book)}"
    return f"{domain}/{doc_id}"  # drama: one play; dictionary: one block of entries


def _is_pack(config: TextDataConfig) -> bool:
    return config.path is None and config.dataset is None


def _documents(config: TextDataConfig) -> Iterator[Document]:
    if config.dataset is not None:
        yield from _from_rows(_hub_rows(config), config)
        return
    files = _source_files(config)
    builder = _builder(config, files.values())
    if builder == "text":
        yield from _from_text_files(config, files)
    else:
        yield from _from_rows(_file_rows(builder, files.values()), config)


def _from_rows(rows: Iterable[Mapping[str, Any]], config: TextDataConfig) -> Iterator[Document]:
    for number, row in enumerate(rows):
        text = _value(row, "text_column", config.text_column, number)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UsageError(f"task.data.text_column: row {number} of '{config.text_column}' is {kind}, not text")
        if config.domain_column is None or (config.domain_column == "domain" and "domain" not in row):
            domain = "all"
        else:
            domain = str(_value(row, "domain_column", config.domain_column, number))
        if config.group_column is not None:
            group = str(_value(row, "group_column", config.group_column, number))
        else:
            group = pack_group(row["domain"], row["doc_id"]) if _is_pack(config) else f"document/{number}"
        yield Document(text=text, domain=domain, group=group)


def _value(row: Mapping[str, Any], field: str, column: str, number: int) -> Any:
    if column not in row:
        known = f"columns: {', '.join(row)}"
        raise UsageError(f"task.data.{field}: there is no column '{column}'.{nearest(column, row)} {known}")
    if row[column] is None:
        raise UsageError(f"task.data.{field}: row {number} of '{column}' is empty (null)")
    return row[column]


def _from_text_files(config: TextDataConfig, files: Mapping[str, Path]) -> Iterator[Document]:
    import gzip

    for name, path in files.items():
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        # One file has the empty name. A folder's files are their own domains, unless subfolders say better.
        first, _, rest = name.partition("/")
        domain = "all"
        if name and config.domain_column is not None:
            domain = first if rest else first.split(".")[0]
        yield Document(text=text, domain=domain, group=f"document/{name}")


def _file_rows(builder: str, files: Iterable[Path]) -> Iterable[Mapping[str, Any]]:
    # Streaming reads local files where they are; without it `datasets` would copy them into its own cache.
    rows: Iterable[Mapping[str, Any]] = load_dataset(
        builder, data_files=[str(path) for path in files], split="train", streaming=True
    )
    return rows


def _hub_rows(config: TextDataConfig) -> Iterable[Mapping[str, Any]]:
    rows: Iterable[Mapping[str, Any]] = load_dataset(
        config.dataset,
        config.config,
        split=config.split,
        revision=config.revision,
        streaming=config.streaming,
    )
    return rows


def _source_files(config: TextDataConfig) -> dict[str, Path]:
    """Return the files by their name inside the folder; a file given by itself has the empty name."""
    if config.path is None:
        return {"": PACK}
    root = Path(config.path).expanduser()
    if root.is_file():
        return {"": root}
    if not root.is_dir():
        near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
        raise UsageError(f"task.data.path: '{config.path}' does not exist.{near}{_how_to_make(config)}")
    found = (p for p in root.rglob("*") if p.is_file() and _ending(p) in BUILDERS)
    files = {p.relative_to(root).as_posix(): p for p in found if not p.name.startswith((".", "_"))}
    if not files:
        raise UsageError(f"task.data.path: '{config.path}' holds no {', '.join(BUILDERS)} (or .gz) file")
    return dict(sorted(files.items()))


def _how_to_make(config: TextDataConfig) -> str:
    return f" Make it: {config.made_by}" if config.made_by else ""


def _builder(config: TextDataConfig, files: Iterable[Path]) -> str:
    builders = sorted({BUILDERS.get(_ending(path), "") for path in files})
    if builders == [""]:
        raise UsageError(f"task.data.path: '{config.path}' must end in {', '.join(BUILDERS)} (or .gz)")
    if len(builders) > 1:
        raise UsageError(f"task.data.path: '{config.path}' mixes {', '.join(builders)} files; keep one kind")
    return builders[0]


def _ending(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _within_budget(documents: Iterable[Document], config: TextDataConfig) -> list[Document]:
    if config.max_bytes is None:
        return list(documents)
    if config.streaming:
        return list(_take(documents, config.max_bytes))
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    share = config.max_bytes // max(1, len(by_domain))
    return [kept for members in by_domain.values() for kept in _take(members, share)]


def _take(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    for document in documents:
        data = document.text.encode()
        if len(data) >= budget:  # the last document is cut, never inside a character
            text = data[:budget].decode(errors="ignore")
            if text:
                yield Document(text=text, domain=document.domain, group=document.group)
            return
        budget -= len(data)
        yield document
