"""The stored responses of a model to the requests of a task, and the results by item, in an append-only file."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.file_access import iter_plain_lines, parse_json, require_no_links
from moebench.runs.append_only_file import AppendOnlyFile
from moebench.runs.checked_json import Types, add_checksum, pop_checksum, require_types

FORMAT = 1
MAX_LINE_BYTES = 4 * 2**20
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
KINDS: dict[str, tuple[type, ...]] = {
    "loglikelihood": (float, bool),
    "loglikelihood_rolling": (float,),
    "generate_until": (str,),
}
"""Kind of request -> types of its response."""
HEADER_TYPES: dict[str, Types] = {"format": int, "subject": str, "task": str, "digest": str, "settings": dict}
RESPONSE_TYPES: dict[str, Types] = {
    "kind": str,
    "item": int,
    "request": int,
    "digest": str,
    "response": list,
    "truncated": bool,
}
ITEM_TYPES: dict[str, Types] = {"item": int, "digest": str, "metrics": dict}


@dataclass(frozen=True, kw_only=True)
class Key:
    """Identifies the request that a response belongs to."""

    kind: Kind
    item: int
    """Number of the item in its task."""
    request: int
    """Number of the request within its item."""
    digest: str
    """Of the text of the request."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What the model done: (log-probability, is greedy), (log-probability,) or (text,)."""

    values: tuple[float | bool | str, ...]
    is_truncated: bool
    """Whether the model read less than the whole context."""


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """The metrics of one item."""

    item: int
    digest: str
    """Of its content: runs are compared on the same items."""
    metrics: Mapping[str, float | tuple[float, float]]
    """Metric -> value, or a sum and its weight; the metric of a whole task is made of them."""
    domain: str | None = None
    num_choices: int | None = None
    gold: tuple[int, ...] = ()
    """The right ones among the choices."""
    is_truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "item": self.item,
            "digest": self.digest,
            "metrics": dict(self.metrics),
            "domain": self.domain,
            "choices": self.num_choices,
            "gold": list(self.gold),
            "truncated": self.is_truncated,
        }


def digest_values(*values: Any) -> str:
    """Return a digest (16 hex digits) of JSON-ready values; others count with their text."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class EvaluationRecord:
    """The file of one model on one task under one set of settings."""

    path: Path
    header: Mapping[str, Any]
    responses: dict[Key, Response] = field(default_factory=dict)
    items: set[int] = field(default_factory=set)
    """Items whose results are in the file."""
    _file: AppendOnlyFile | None = field(default=None, repr=False)

    def append_responses(self, responses: Mapping[Key, Response]) -> None:
        """Add responses, and block until they are on the disk; without a file they are kept in memory."""
        self.responses |= responses
        if self._file is None:
            return
        for key, response in responses.items():
            value: dict[str, Any] = {"kind": key.kind, "item": key.item, "request": key.request, "digest": key.digest}
            value |= {"response": list(response.values), "truncated": response.is_truncated}
            self._file.append_line(_to_line(value))
        self._file.flush()

    def append_items(self, items: Sequence[ItemResult]) -> None:
        """Add the results of items that are not in the file yet."""
        assert self._file is not None
        for item in items:
            if item.item not in self.items:
                self._file.append_line(_to_line(item.to_dict()))
                self.items.add(item.item)
        self._file.flush()


@contextmanager
def open_record(folder: Path, subject: str, task: str, settings: Mapping[str, Any]) -> Iterator[EvaluationRecord]:
    """Open the record of a task in a folder, and keep other processes from it meanwhile.

    `settings`: what determines the results besides the model. Raises UsageError for a damaged file, one of another
    model, and where another process evaluates the same.
    """
    header = {"format": FORMAT, "subject": subject, "task": task, "digest": digest_values(settings)}
    path = folder / f"{_to_file_name(task)}-{header['digest']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    require_no_links(folder)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            record = read_record(path, header) if path.exists() else EvaluationRecord(path=path, header=header)
            with AppendOnlyFile(path) as file:
                if not record.header.get("settings"):
                    record.header = header | {"settings": dict(settings)}
                    file.append_line(_to_line(record.header))
                record._file = file
                yield record
    except Timeout as error:
        raise UsageError(f"{path}: another process evaluates the same; wait for it") from error


def read_record(path: Path, expected: Mapping[str, Any]) -> EvaluationRecord:
    """Read a record; an incomplete last line, left by a crash, counts as missing.

    Raises UsageError, which names file and line, for anything else than such a record of the expected header.
    """
    record = EvaluationRecord(path=path, header=dict(expected))
    try:
        for number, line in enumerate(iter_plain_lines(path, max_line_bytes=MAX_LINE_BYTES), 1):
            if not line.endswith(b"\n"):
                break
            try:
                _read_line(record, line, number, expected)
            except (ValueError, TypeError, KeyError) as error:
                remedy = "delete it to evaluate again"
                raise UsageError(f"{path}: line {number} is damaged ({error}); {remedy}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    return record


def _read_line(record: EvaluationRecord, line: bytes, number: int, expected: Mapping[str, Any]) -> None:
    values = parse_json(line)
    if not isinstance(values, dict) or "checksum" not in values:
        raise ValueError("it is no object with a checksum")
    values = pop_checksum(values)
    if number == 1:
        require_types(values, HEADER_TYPES)
        different = next((key for key, value in expected.items() if values[key] != value), None)
        if different:
            raise ValueError(f"its {different} is {str(values[different])[:40]!r}, not {expected[different]!r}")
        record.header = values
    elif "response" in values:
        key, response = _read_response(values)
        record.responses[key] = response
    else:
        require_types(values, ITEM_TYPES)
        record.items.add(values["item"])


def _read_response(values: Mapping[str, Any]) -> tuple[Key, Response]:
    require_types(values, RESPONSE_TYPES)
    kind, response = values["kind"], tuple(values["response"])
    if kind not in KINDS:
        raise ValueError(f"the kind {kind!r} is unknown")
    types = tuple(type(value) for value in response)
    if types != KINDS[kind] or not all(math.isfinite(value) for value in response if isinstance(value, float)):
        raise ValueError(f"{str(response)[:40]!r} is no response of the kind {kind}")
    key = Key(kind=kind, item=values["item"], request=values["request"], digest=values["digest"])
    return key, Response(values=response, is_truncated=values["truncated"])


def _to_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(add_checksum(values), sort_keys=True, allow_nan=False).encode()


def _to_file_name(task: str) -> str:
    """Return the name of a task with letters, digits, dashes and underscores alone, at most 100 of them."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in task)[:100] or "task"
