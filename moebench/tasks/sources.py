"""What all tasks that read data from files or a hub have in common."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, require, unknown
from moebench.tasks.task import OUT_OF_DOMAIN

HUB_OPTIONS = ("config", "revision", "split", "test_split")
"""Options of a data section that say something about a hub data set alone."""

LOADERS = (
    "arrow audiofolder conll csv eval fasta fastq genbank generator harbor hdf5 iceberg imagefolder json lance"
    " meshfolder mmcif niftifolder pandas parquet pdb pdffolder spark sql text tsfile videofolder vortex webdataset xml"
)
"""Names that `datasets` takes for the kind of the files in the working folder, and not for a name on the hub."""


def check_source(data: Any, names: Iterable[str]) -> None:
    """Refuse two sources, options of a hub without its data set, empty `names` and a domain held out twice.

    `data`: the section task.data.
    """
    if data.path is not None and data.dataset is not None:
        raise UsageError("task.data.path and task.data.dataset are both given; set one of them to null")
    defaults = {option.name: option.default for option in fields(data)}
    for name in HUB_OPTIONS:
        if data.dataset is None and name in defaults and getattr(data, name) != defaults[name]:
            raise UsageError(f"task.data.{name}: '{getattr(data, name)}' needs task.data.dataset, a hub name")
    for name in ("path", "dataset", "split", *names):
        if getattr(data, name) == "":
            raise UsageError(f"task.data.{name}: an empty name was given; give a name")
    if data.dataset is not None:
        _refuse_local(data.dataset)
    held_out = getattr(data, "held_out_domains", [])
    once = len(set(held_out)) == len(held_out)
    require(once, "task.data.held_out_domains", held_out, "a list that names each domain once")


def _refuse_local(name: str) -> None:
    """Refuse a hub name that `datasets` would read from this machine.

    A hub data set is identified by its name and revision, so that other files there would count as the same data.
    """
    try:
        exists = Path(name).exists()
    except (OSError, ValueError):
        exists = False  # too long, or with a NUL: the hub says what is wrong with it
    if exists or name.startswith((".", "/", "~", "file:")):
        raise UsageError(
            f"task.data.dataset: '{name}' is a local path, and the name of a data set on the hub is wanted; give"
            f" task.data.path={name}"
        )
    if name in LOADERS.split():
        raise UsageError(
            f"task.data.dataset: '{name}' is a reader of local files, and the name of a data set on the hub is wanted;"
            " give the files with task.data.path=..."
        )


def check_domain_names(domains: Sequence[str]) -> None:
    """Refuse a domain with the name of a metric."""
    if OUT_OF_DOMAIN in domains:
        raise UsageError(
            f"task.data.domain_column: there is a domain '{OUT_OF_DOMAIN}', which is the name of a metric; rename it"
        )


def checked_held_out(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the domains to hold out, in order.

    Refuses those that the data lack, all of `known`, and a domain with the name of a metric.
    """
    key = "task.data.held_out_domains"
    for name in names:
        if name not in known:
            raise unknown(key, name, known)
    require(len(names) < len(known), key, names, f"some of {', '.join(known)}, or nothing is left to train on")
    check_domain_names(known)
    return sorted(names)


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes, or why it cannot be read; read once for each time it was written."""
    try:
        state = path.stat()
        return _cached_digest(path.resolve(), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:  # whoever decodes it says so, or leaves it out
        return type(error).__name__


def note(message: str) -> None:
    """Say on standard error what became of the data, once: when it is prepared."""
    print(f"task.data: {message}", file=sys.stderr)


def load_dataset(*arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset` without its bars, warnings and telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)  # a line for each of its tries
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is raised, and said once
    return datasets.load_dataset(*arguments, **options)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@lru_cache(maxsize=1 << 17)
def _cached_digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
