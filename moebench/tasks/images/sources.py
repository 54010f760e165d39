"""Where images come from: the embedded sets, folders, tables or a hub, each read into the same entries."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.tasks.folders import TEST, TRAIN, existing, files_below, folders_of, parts_of
from moebench.tasks.images.config import EMBEDDED, ImageDataConfig
from moebench.tasks.sources import file_digest, first_line
from moebench.tasks.tables import TABLES, Table, content_of, hub_table, local_table, named

PACK = Path(__file__).parent.parent / "data"
ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
NOT_SOURCE = ("path", "held_out_classes")
"""Options that leave the prepared arrays as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One image before it is decoded."""

    name: str
    """File or row: what an error names."""
    image: Any
    """Encoded bytes, or the path of a file."""
    label: str
    domain: str = "all"
    part: str = TRAIN
    """validation or test where the source keeps them apart from what is trained on, or divided."""


def read_entries(config: ImageDataConfig) -> list[Entry]:
    """Return all images of the source in its order; raise `UsageError` for what cannot be read."""
    name = config.dataset or config.path
    try:
        entries = list(_entries(config))
    except UsageError:
        raise
    except Exception as error:  # a network raises almost anything
        advice = "check task.data.config, split and revision, or give local files with task.data.path=..."
        raise UsageError(f"{config.key}: '{name}' cannot be read ({first_line(error)}); {advice}") from error
    if not entries:
        raise UsageError(f"{config.key}: '{name}' holds no images")
    return entries


def class_names(entries: Sequence[Entry], config: ImageDataConfig) -> list[str]:
    """Return the labels in the order of the classes: of the embedded sets their own, else by number or by name."""
    if config.is_embedded:
        return [f"{source}/{name}" for source in config.sources for name in EMBEDDED[source]]
    labels = {entry.label for entry in entries}
    if len(labels) < 2:
        where = "a folder for each class, or the table of their labels" if config.path else "a column of labels"
        raise UsageError(f"{config.key}: all images are of one class, '{min(labels)}'; give {where} (at least two)")
    return (
        sorted(labels, key=int) if all(re.fullmatch("0|-?[1-9][0-9]*", label) for label in labels) else sorted(labels)
    )


def source_digest(config: ImageDataConfig) -> str:
    """Return a cheap SHA-256 (hex) of what decides the arrays: file bytes and options, never where files lie.

    A hub data set counts by name, configuration, splits and revision: pin a commit to identify its bytes.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_SOURCE}
    if not config.is_embedded:
        fields["sources"] = None
    if config.dataset is None:
        fields["files"] = [[name, file_digest(path)] for name, path in _files_and_references(config)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _entries(config: ImageDataConfig) -> Iterator[Entry]:
    if config.is_embedded:
        yield from _embedded(config)
    elif config.dataset is not None:
        yield from _hub(config.dataset, config)
    else:
        files = _source_files(config)
        if not _is_table(files):
            yield from _from_folder(files, config)
            return
        parts = parts_of(files, by_file=True)
        for name, path in files.items():
            yield from _from_rows(local_table(path, name), parts.get(name, TRAIN), config)


def _embedded(config: ImageDataConfig) -> Iterator[Entry]:
    import pyarrow.parquet as pq

    for source in config.sources:
        for part in (TRAIN, TEST):
            rows = pq.read_table(PACK / f"{source}_{part}.parquet").to_pylist()
            for number, row in enumerate(rows):
                label = f"{source}/{EMBEDDED[source][row['label']]}"
                name = f"{source}_{part}, row {number}"
                yield Entry(name=name, image=row["image"]["bytes"], label=label, domain=source, part=part)


def _from_folder(files: Mapping[str, Path], config: ImageDataConfig) -> Iterator[Entry]:
    parts = parts_of(files, by_file=False)
    divided, seen = bool(parts), set()
    for name, path in files.items():
        folders = folders_of(name, divided=divided)
        if not folders:
            raise UsageError(f"task.data.path: '{name}' lies in no class folder; put each image into one")
        seen.add("/".join(name.split("/")[: 1 + divided]))
        yield Entry(name=name, image=path, label=folders[0], part=parts.get(name, TRAIN))
    root = existing(config.path or "")
    tops = [root / name for name in dict.fromkeys(name.split("/")[0] for name in files)] if divided else [root]
    folders = [p.relative_to(root).as_posix() for top in tops for p in sorted(top.iterdir()) if p.is_dir()]
    empty = [name for name in folders if name not in seen and not name.split("/")[-1].startswith((".", "__"))]
    if empty and not config.skip_broken:
        raise UsageError(f"task.data.path: folder '{empty[0]}' holds no images; remove it, or set skip_broken=true")


def _from_rows(table: Table, part: str, config: ImageDataConfig) -> Iterator[Entry]:
    wanted = {key: getattr(config, key) for key in ("image_column", "label_column", "domain_column")}
    columns = {key: column for key, column in wanted.items() if column is not None}
    for key, column in columns.items():
        table.check(key, column)
    for place, row in table.read(columns.values()):
        domain = "all"
        if config.domain_column is not None:
            domain = named(row[config.domain_column], "domain_column", config.domain_column, place)
        label = _label(row[config.label_column], config.label_column, place)
        image = content_of(row[config.image_column], table.folder)
        yield Entry(name=place, image=image, label=label, domain=domain, part=part)


def _label(value: Any, column: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        kind = "empty (null)" if value in (None, "") else type(value).__name__
        raise UsageError(f"task.data.label_column: '{column}' of {place} is {kind}, no whole number or name")
    return str(value)


def _hub(name: str, config: ImageDataConfig) -> Iterator[Entry]:
    splits = {config.split: TRAIN} | ({} if config.test_split is None else {config.test_split: TEST})
    for split, part in splits.items():
        yield from _from_rows(hub_table(name, config.config, split=split, revision=config.revision), part, config)


def _source_files(config: ImageDataConfig) -> dict[str, Path]:
    """Return the files by their name inside the folder, all images or all tables."""
    assert config.path is not None
    root = existing(config.path)
    if root.is_file():
        files = files_below(root, TABLES)
        if not files:
            allowed = ", ".join(TABLES)
            raise UsageError(f"task.data.path: '{config.path}' must be a folder of images, or end in {allowed}")
        return files
    for endings in (ENDINGS, TABLES):
        files = files_below(root, endings)
        if files:
            return files
    allowed = ", ".join(ENDINGS)
    raise UsageError(f"task.data.path: '{config.path}' holds no images ({allowed}) and no table ({', '.join(TABLES)})")


def _files_and_references(config: ImageDataConfig) -> Iterator[tuple[str, Path]]:
    """Yield all files that the content depends on: those of the source, and those that tables name."""
    if config.is_embedded:
        names = [f"{source}_{part}.parquet" for source in config.sources for part in (TRAIN, TEST)]
        yield from ((name, PACK / name) for name in names)
        return
    files = _source_files(config)
    yield from (("" if len(files) == 1 else name, path) for name, path in files.items())
    if _is_table(files):
        entries = (entry for entry in read_entries(config) if isinstance(entry.image, Path))
        yield from ((f"image {number}", entry.image) for number, entry in enumerate(entries))


def read_endings(config: ImageDataConfig) -> tuple[str, ...]:
    """Return the endings of the files that are read: tables only where there are no images."""
    return TABLES if config.path is None or _is_table(_source_files(config)) else ENDINGS


def _is_table(files: Mapping[str, Path]) -> bool:
    """Whether the files, all of one kind, are tables."""
    return next(iter(files)).lower().endswith(TABLES)
