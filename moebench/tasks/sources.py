"""Where data of any kind comes from: digests of files, and data sets on a hub."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file; one that has not changed since is not read again."""
    state = path.stat()
    return _cached_digest(path.resolve(), state.st_mtime_ns, state.st_size)


def load_dataset(*arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`, with nothing printed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is raised, and said once
    return datasets.load_dataset(*arguments, **options)


@lru_cache(maxsize=4096)
def _cached_digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
