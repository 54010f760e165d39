"""Checks, digests and messages shared by all tasks that read files or data sets of the Hugging Face hub."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, build_unknown_error, require
from moebench.printable import print_text
from moebench.tasks.task import OUT_OF_DOMAIN

HUB_OPTIONS = ("config", "revision", "split", "test_split")
"""Options of `task.data` that apply only to a data set of the hub."""

LOADERS = (
    "arrow audiofolder conll csv eval fasta fastq genbank generator harbor hdf5 iceberg imagefolder json lance"
    " meshfolder mmcif niftifolder pandas parquet pdb pdffolder spark sql text tsfile videofolder vortex webdataset xml"
)
"""Names that `datasets` interprets as loaders of local files instead of names on the hub."""


def check_source(data: Any, names: Iterable[str]) -> None:
    """Raise UsageError if the options of `task.data` contradict each other.

    Refused are two sources, options of the hub without a data set, empty values of `names`, and a domain that is held
    out twice.
    """
    if data.path is not None and data.dataset is not None:
        raise UsageError("task.data.path and task.data.dataset are both given; set one of them to null")
    defaults = {option.name: option.default for option in fields(data)}
    for name in HUB_OPTIONS:
        if data.dataset is None and name in defaults and getattr(data, name) != defaults[name]:
            raise UsageError(f"task.data.{name}: '{getattr(data, name)}' needs task.data.dataset, a name on the hub")
    for name in ("path", "dataset", "split", *names):
        if getattr(data, name) == "":
            raise UsageError(f"task.data.{name}: an empty name was given; give a name")
    if data.dataset is not None:
        _check_hub_name(data.dataset)
    held_out = getattr(data, "held_out_domains", [])
    is_unique = len(set(held_out)) == len(held_out)
    require(is_unique, "task.data.held_out_domains", held_out, "a list that names each domain once")


def _check_hub_name(name: str) -> None:
    """Raise UsageError for a name that `datasets` would read from local files.

    A hub data set is identified by name and revision, which do not change when local files do.
    """
    try:
        exists = Path(name).exists()
    except (OSError, ValueError):
        exists = False  # too long, or with a NUL: the hub reports it
    if exists or name.startswith((".", "/", "~", "file:")):
        raise UsageError(
            f"task.data.dataset: '{name}' is a local path, not the name of a data set on the hub; give"
            f" task.data.path={name}"
        )
    if name in LOADERS.split():
        raise UsageError(
            f"task.data.dataset: '{name}' is a loader of local files, not the name of a data set on the hub; give"
            " the files with task.data.path=..."
        )


def check_domain_names(domains: Sequence[str]) -> None:
    """Raise UsageError for a domain that has the name of a metric."""
    if OUT_OF_DOMAIN in domains:
        raise UsageError(
            f"task.data.domain_column: there is a domain '{OUT_OF_DOMAIN}', which is the name of a metric; rename it"
        )


def check_held_out(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the domains to hold out, sorted.

    Raises UsageError for domains that the data lack, for all of `known`, and for a domain with the name of a metric.
    """
    key = "task.data.held_out_domains"
    for name in names:
        if name not in known:
            raise build_unknown_error(key, name, known)
    require(len(names) < len(known), key, names, f"some of {', '.join(known)}, so that some are left to train on")
    check_domain_names(known)
    return sorted(names)


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, cached until it is written; the type of the error if it is not readable."""
    try:
        state = path.stat()
        return _read_cached_digest(path.resolve(), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:  # decoding it fails, or skips it
        return type(error).__name__


def warn(message: str) -> None:
    """Print a message about the data on standard error, while they are prepared."""
    print_text(f"task.data: {message}", file=sys.stderr)


@cache
def warn_of_changing_data(name: str, revision: str | None) -> None:
    """Warn, once for each data set, that its bytes may change between two runs, unless `revision` is a commit."""
    if re.fullmatch("[0-9a-f]{40}", revision or "") is None:
        given = "no revision" if revision is None else f"revision '{revision}', which is not a commit"
        warn(f"data set '{name}' of the hub has {given}: its content may change between runs; give a commit")


def load_dataset(name: str, config: str | None, *, revision: str | None, **options: Any) -> Any:
    """Call `datasets.load_dataset` without progress bars, warnings and telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)  # it logs every retry
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are raised anyway
    dataset = datasets.load_dataset(name, config, revision=revision, **options)
    warn_of_changing_data(name, revision)
    return dataset


def first_line(error: Exception) -> str:
    """Return the first line of the message of an error, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@lru_cache(maxsize=1 << 17)
def _read_cached_digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
