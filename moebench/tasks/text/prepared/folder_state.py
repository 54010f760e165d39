"""The state of a folder that is being prepared: its lock, what it was begun with, and how it is removed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.file_access import read_plain_json, require_no_links
from moebench.tasks.text.prepared.manifest import BYTES, COUNTS, OVERLAP, STATE, TOKENIZER
from moebench.tasks.text.prepared.options import FORMAT, PrepareOptions
from moebench.tasks.text.prepared.shards import UNFINISHED, write_file
from moebench.tasks.text.prepared.source import CorpusSource
from moebench.tasks.text.tokens import tokenizer_file

LOCK = ".lock"


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Create the folder and hold its lock; raise UsageError if another process prepares it."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out: '{out}' is not a folder; give another name")
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()} - {LOCK, f"{STATE}{UNFINISHED}"}
    if names and STATE not in names:
        raise UsageError(f"--out: '{out}' is not empty (it has '{min(names)}'); give a new folder")
    require_no_links(out)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        raise UsageError(f"--out: '{out}' is being prepared by another process") from None


def begin_folder(out: Path, state: Mapping[str, Any]) -> bool:
    """Write the state of a new folder, or compare it with that of an earlier call; return whether the folder is new."""
    try:
        earlier = read_plain_json(out / STATE)
    except FileNotFoundError:
        write_file(out, STATE, [json.dumps(state, indent=1).encode()])
        return True
    except (OSError, ValueError) as error:
        raise UsageError(f"--out: {out / STATE} cannot be read ({error}); remove the folder") from error
    if earlier != state:
        change = _first_change(earlier, state)
        raise UsageError(f"--out: '{out}' was begun with {change}; remove it, or give a new folder")
    return False


def describe_state(options: PrepareOptions, source: CorpusSource) -> dict[str, Any]:
    """Return what must not change until a folder is finished: the options, the tokenizer and the files."""
    content = options.describe() | _tokenizer_state(options)
    return {"format": FORMAT, "options": content, "source": source.fingerprint()}


def _tokenizer_state(options: PrepareOptions) -> dict[str, str]:
    """Return the checksum of a tokenizer file: an edited one is another."""
    path = None if options.vocab_to_train is not None else tokenizer_file(options.tokenizer)
    return {} if path is None else {"tokenizer": hashlib.sha256(path.read_bytes()).hexdigest()}


def _first_change(earlier: Any, state: Mapping[str, Any]) -> str:
    before = earlier.get("options") if isinstance(earlier, dict) else None
    for name, value in state["options"].items():
        if isinstance(before, dict) and before.get(name) != value:
            return f"another {name.replace('_', ' ')} ({before.get(name)!r}, now {value!r})"
    return "other files, or files that were changed since"


def discard(out: Path) -> None:
    """Remove what was made in the folder, and the folder if it is empty then."""
    if not out.is_dir():
        return
    names = (STATE, TOKENIZER, OVERLAP, COUNTS, BYTES, LOCK)
    for pattern in (*names, "*-?????.bin", "shard-?????.json", f"*{UNFINISHED}"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        os.rmdir(out)
