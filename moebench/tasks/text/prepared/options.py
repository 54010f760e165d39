"""What `moebench prepare` is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, require
from moebench.tasks.text.sources import OPTIONAL, TextDataConfig

FORMAT = 1
"""Raised when the same options give other files."""
BLOCK = 1 << 20
"""Characters that are encoded at once: longer documents are cut, at the end of a line if there is one."""
SMALL_BLOCK = 1 << 16
"""Characters of a block that is a document of its own (`--split-by block`)."""
SHARD_BYTES = 256 << 20
SAMPLE_BYTES = 64 << 20
SPLIT_BY = ("document", "file", "block")
TRAINED = "train:"
"""Prefix of a tokenizer that is trained on the text."""
MIN_VOCAB = 257
"""Smallest vocabulary that is trained: the bytes and the separator."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The source, the tokenizer and the division of a prepared folder."""

    sources: tuple[str, ...]
    """Files, folders and patterns of files."""
    out: Path
    tokenizer: str
    """What `task.data.tokenizer` takes, or train:VOCAB."""
    data: TextDataConfig
    """The columns, and the data set of the hub if that is the source."""
    split_by: str = "document"
    """What is never divided between splits: a document (or its group), a file, or a block of 64 KiB of text."""
    validation: float = 0.05
    test: float = 0.05
    """Shares of the documents, where the source does not assign splits."""
    shard_bytes: int = SHARD_BYTES
    """Bytes of tokens in a shard: it ends with the block that reaches them."""
    sample_bytes: int = SAMPLE_BYTES
    """Bytes of training text that a tokenizer is trained on."""
    remove_overlap: bool = True
    """Leave out validation and test documents that the training split has too (`task.data.remove_overlap`)."""
    workers: int = 1
    """Threads that encode; the result does not depend on their number."""

    def __post_init__(self) -> None:
        given = " ".join(self.sources) or "nothing"
        require(bool(self.sources) != (self.data.dataset is not None), "DATA", given, "files, or --dataset")
        require(self.split_by in SPLIT_BY, "--split-by", self.split_by, f"one of {', '.join(SPLIT_BY)}")
        if self.split_by != "document" and self.data.group_column is not None:
            raise UsageError(f"--split-by {self.split_by}: --group-column divides by group; give one of them")
        for name, share in (("--validation", self.validation), ("--test", self.test)):
            require(0 < share < 1, name, share, "between 0 and 1")
        require(self.validation + self.test < 1, "--validation and --test", self.validation + self.test, "below 1")
        require(self.shard_bytes >= 1, "--shard-bytes", self.shard_bytes, "at least 1")
        require(self.sample_bytes >= 1, "--sample-bytes", self.sample_bytes, "at least 1")
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
        self.vocab_to_train  # noqa: B018  (it checks the number)

    @property
    def vocab_to_train(self) -> int | None:
        """Size of the vocabulary that is trained; None for a tokenizer that exists."""
        if not self.tokenizer.startswith(TRAINED):
            return None
        number = self.tokenizer.removeprefix(TRAINED)
        allowed = f"{TRAINED}VOCAB with VOCAB from {MIN_VOCAB} to {1 << 20}"
        is_number = number.isascii() and number.isdecimal() and len(number) < 9
        require(is_number and MIN_VOCAB <= int(number) <= 1 << 20, "--tokenizer", self.tokenizer, allowed)
        return int(number)

    def describe(self) -> dict[str, Any]:
        """Return the options that determine the result, ready for JSON."""
        names = ("dataset", "config", "split", "revision", "text_column", "domain_column", "group_column")
        columns = {name: value for name, value in asdict(self.data).items() if name in names}
        if self.data.dataset is None:
            columns = {name: value for name, value in columns.items() if "column" in name}
        kept = ("tokenizer", "split_by", "validation", "test", "remove_overlap", "shard_bytes")
        options = {name: getattr(self, name) for name in kept}
        trained = {} if self.vocab_to_train is None else {"sample_bytes": self.sample_bytes}
        return {**columns, **options, **trained}


def describe_source(
    sources: Sequence[str], hub: Mapping[str, str | None] | None, columns: Mapping[str, str | None]
) -> TextDataConfig:
    """Return the options by which documents are read, of files or (`hub`) of a data set of the hub."""
    if hub is not None:
        # A stream: nothing is downloaded as a whole, and there is no limit.
        return TextDataConfig(**hub, **columns, streaming=True, max_bytes=1 << 62)  # type: ignore[arg-type]
    return TextDataConfig(path=next(iter(sources), None), **columns)  # type: ignore[arg-type]


def has_optional_domain(data: TextDataConfig) -> bool:
    """Return whether tables may lack the column of domains."""
    return data.domain_column == OPTIONAL
