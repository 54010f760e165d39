"""The manifest of a checkpoint: its step and cell, the digests of its files, and the records that belong to it."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moebench.file_access import read_plain_file
from moebench.stored_values import require_count

_NAME = re.compile(r"step_(\d+)\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class RecordPrefix:
    """The beginning of a file that only grows, such as a journal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    sha256: Mapping[str, str]
    """File of the checkpoint's folder -> SHA-256 (hex)."""
    bytes: int = 0
    """Size of all files together."""
    cell: str | None = None
    """Id of the cell; None: not recorded, by a version that did not do so."""
    records: Mapping[str, RecordPrefix] = field(default_factory=dict)
    """File of the run folder -> what it contained when the checkpoint was written."""

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest; raise ValueError with the reason, or OSError, if it is damaged or of another step."""
        try:
            values = json.loads(read_plain_file(path))
        except RecursionError as error:
            raise ValueError("the manifest is nested too deeply") from error
        checksum = values.pop("checksum", None) if isinstance(values, dict) else None
        if checksum not in (None, _digest(values)):  # earlier versions wrote none
            raise ValueError("the manifest does not match its own checksum")
        sums = values.get("sha256") if isinstance(values, dict) else None
        if not isinstance(sums, dict) or not all(_is_sum(name, digest) for name, digest in sums.items()):
            raise ValueError("the manifest has no list of checksums")
        if not {*values} <= {entry.name for entry in fields(cls)}:
            raise ValueError("the manifest has an unknown key")
        if values.get("step", -1) != parse_step(path):
            raise ValueError(f"it is the checkpoint of step {values.get('step')}, under another name")
        cell, records = values.get("cell"), values.get("records", {})
        if not isinstance(cell, str | None) or not isinstance(records, dict):
            raise ValueError("the manifest has a damaged cell or records")
        prefixes = {str(name): _parse_prefix(prefix) for name, prefix in records.items()}
        return cls(
            step=values["step"], sha256=sums, bytes=require_count(values.get("bytes", 0)), cell=cell, records=prefixes
        )

    def to_json(self) -> str:
        """Return the content of the file."""
        values = asdict(self)
        return json.dumps(values | {"checksum": _digest(values)})


Check = Callable[[Manifest], str | None]
"""Returns why a checkpoint does not belong to a run, or None."""


def accept_all(manifest: Manifest) -> str | None:
    """Accept every checkpoint."""
    return None


def parse_step(file: Path) -> int:
    """Return the step in the name of a checkpoint or manifest."""
    return int(file.stem.removeprefix("step_"))


def list_manifests(folder: Path) -> list[Path]:
    """Return the manifests of a folder of checkpoints, by step; files with other names are ignored."""
    return sorted((path for path in folder.glob("step_*.json") if _NAME.fullmatch(path.name)), key=parse_step)


def list_unlisted(manifest: Manifest, folder: Path, required: tuple[str, ...]) -> Iterator[str]:
    """Yield a line for each file that a checkpoint lacks, or that its manifest does not list."""
    names = {path.name for path in folder.iterdir()}
    for name in sorted({*required, *names} - {*manifest.sha256}):
        yield f"{name} is not in its manifest"
    for name in sorted({*manifest.sha256} - names):
        yield f"{name} is missing"


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_sum(name: str, digest: Any) -> bool:
    # A name with a separator would be a file outside the checkpoint.
    return Path(name).name == name and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def _parse_prefix(prefix: Any) -> RecordPrefix:
    if not isinstance(prefix, dict) or not isinstance(prefix.get("sha256"), str):
        raise ValueError("the manifest has a damaged record")
    return RecordPrefix(bytes=require_count(prefix.get("bytes")), sha256=prefix["sha256"])
