"""Sources of images: embedded sets, folders, tables or the Hugging Face hub, each read into the same entries."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, build_unknown_error, require
from moebench.ranges import Range, at_least_1_up_to, check_ranges
from moebench.tasks.folders import (
    TEST,
    TRAIN,
    assign_parts,
    find_source,
    format_relative_path,
    list_files,
    list_parent_folders,
)
from moebench.tasks.sources import check_source, file_digest, first_line
from moebench.tasks.tables import TABLES, Table, open_hub_table, open_table, read_content, read_name

PACK = Path(__file__).parent.parent / "data"
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
NOT_SOURCE = ("path", "held_out_classes")
"""Options that do not change the prepared arrays."""


FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EMBEDDED = {"fashion": FASHION, "mnist": tuple(str(digit) for digit in range(10))}
"""Embedded image sets and their classes in the order of labels."""


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Which images to train on and how they become arrays; by default 24,000 embedded images of Fashion-MNIST."""

    RANGES: ClassVar[Mapping[str, Range]] = {"size": at_least_1_up_to(4096)}

    sources: list[str] = field(default_factory=lambda: ["fashion"])
    """Embedded sets, each a domain with its own ten classes: fashion, mnist or both."""
    path: str | None = None
    """Folder of images with one subfolder per class, or .parquet, .csv, .jsonl or .json with a column of images (bytes
    or file names) and one of labels, instead of `sources`. Folders or tables named train, validation (val, valid, dev)
    and test are kept as splits."""
    dataset: str | None = None
    """Data set on the Hugging Face hub, instead of `sources`."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read."""
    test_split: str | None = None
    """Split of the hub data set that is the test set; null: a tenth of `split`."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    image_column: str = "image"
    """Column of the image."""
    label_column: str = "label"
    """Column of the class: numbers or names."""
    domain_column: str | None = None
    """Column of the domain; null: all images are of one domain, 'all'."""
    size: int = 28
    """Height and width in pixels; images of other sizes are resized without keeping proportions."""
    colour: Literal["grey", "rgb"] = "grey"
    """Number of channels: grey has one, rgb three."""
    held_out_classes: list[int] = field(default_factory=list)
    """Classes (counted from 0) that are excluded from training and testing, for the few-shot probe."""
    skip_broken: bool = False
    """Skip and count images that cannot be read (metric skipped_images), instead of failing at the first."""

    def __post_init__(self) -> None:
        check_source(self, ("test_split", "image_column", "label_column", "domain_column"))
        for source in self.sources:
            if source not in EMBEDDED:
                raise build_unknown_error("task.data.sources", source, EMBEDDED)
        is_unique = len(set(self.sources)) == len(self.sources) > 0
        require(
            is_unique, "task.data.sources", self.sources, "a list that names each of fashion and mnist at most once"
        )
        check_ranges(self, "task.data")
        held_out = self.held_out_classes
        fits = len(set(held_out)) == len(held_out) and all(label >= 0 for label in held_out)
        require(fits, "task.data.held_out_classes", held_out, "a list of different classes, counted from 0")

    @property
    def is_embedded(self) -> bool:
        """Whether the images are embedded ones."""
        return self.path is None and self.dataset is None

    @property
    def key(self) -> str:
        """Key of the source, for error messages."""
        return "task.data.dataset" if self.dataset else "task.data.path" if self.path else "task.data.sources"

    @property
    def num_channels(self) -> int:
        """Number of channels per pixel."""
        return 1 if self.colour == "grey" else 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One image before it is decoded."""

    name: str
    """File or row, for messages."""
    image: Any
    """Encoded bytes, or the path of a file."""
    label: str
    domain: str = "all"
    part: str = TRAIN
    """Split that the source assigns; train where it assigns none, and then divided further."""


def read_entries(config: ImageDataConfig) -> list[Entry]:
    """Return all images of the source in its order; raise UsageError for what cannot be read."""
    name = config.dataset or config.path
    try:
        entries = list(_entries(config))
    except UsageError:
        raise
    except Exception as error:  # of many kinds, from the network and its libraries
        advice = "check task.data.config, split and revision, or give local files with task.data.path=..."
        raise UsageError(f"{config.key}: '{name}' cannot be read ({first_line(error)}); {advice}") from error
    if not entries:
        raise UsageError(f"{config.key}: '{name}' has no images")
    return entries


def class_names(entries: Sequence[Entry], config: ImageDataConfig) -> list[str]:
    """Return the class names in order: the order of embedded sets, else numeric or alphabetic."""
    if config.is_embedded:
        return [f"{source}/{name}" for source in config.sources for name in EMBEDDED[source]]
    labels = {entry.label for entry in entries}
    if len(labels) < 2:
        advice = "one folder per class, or a table of labels" if config.path else "a column of labels"
        raise UsageError(f"{config.key}: all images are of one class, '{min(labels)}'; give {advice} (at least two)")
    return (
        sorted(labels, key=int) if all(re.fullmatch("0|-?[1-9][0-9]*", label) for label in labels) else sorted(labels)
    )


def source_digest(config: ImageDataConfig) -> str:
    """Return a SHA-256 (hex) of the options and file contents that determine the arrays, independent of paths.

    A hub data set is identified by name, configuration, splits and revision: pin a commit to identify its bytes.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_SOURCE}
    if not config.is_embedded:
        fields["sources"] = None
    if config.dataset is None:
        fields["files"] = [[name, file_digest(path)] for name, path in _files_and_references(config)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _entries(config: ImageDataConfig) -> Iterator[Entry]:
    if config.is_embedded:
        yield from _read_embedded(config)
    elif config.dataset is not None:
        yield from _from_hub(config.dataset, config)
    else:
        files = _source_files(config)
        if not _is_table(files):
            yield from _from_folder(files, config)
            return
        parts = assign_parts(files, by_file=True)
        for name, path in files.items():
            yield from _from_rows(open_table(path, name), parts.get(name, TRAIN), config)


def _read_embedded(config: ImageDataConfig) -> Iterator[Entry]:
    import pyarrow.parquet as pq

    for source in config.sources:
        for part in (TRAIN, TEST):
            rows = pq.read_table(PACK / f"{source}_{part}.parquet").to_pylist()
            for number, row in enumerate(rows):
                label = f"{source}/{EMBEDDED[source][row['label']]}"
                name = f"{source}_{part}, row {number}"
                yield Entry(name=name, image=row["image"]["bytes"], label=label, domain=source, part=part)


def _from_folder(files: Mapping[str, Path], config: ImageDataConfig) -> Iterator[Entry]:
    parts = assign_parts(files, by_file=False)
    is_divided, with_images = bool(parts), set()
    for name, path in files.items():
        folders = list_parent_folders(name, divided=is_divided)
        if not folders:
            raise UsageError(f"task.data.path: '{name}' is in no class folder; put each image into one")
        with_images.add("/".join(name.split("/")[: 1 + is_divided]))
        yield Entry(name=name, image=path, label=folders[0], part=parts.get(name, TRAIN))
    root = find_source(config.path or "")
    tops = {root / path.relative_to(root).parts[0]: None for path in files.values()} if is_divided else [root]
    folders = [format_relative_path(p, root) for top in tops for p in sorted(top.iterdir()) if p.is_dir()]
    empty = [name for name in folders if name not in with_images and not name.split("/")[-1].startswith((".", "__"))]
    if empty and not config.skip_broken:
        raise UsageError(f"task.data.path: folder '{empty[0]}' has no images; remove it, or set skip_broken=true")


def _from_rows(table: Table, part: str, config: ImageDataConfig) -> Iterator[Entry]:
    keys = ("image_column", "label_column", "domain_column")
    columns = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    for key, column in columns.items():
        table.check(key, column)
    for location, row in table.read(columns.values()):
        domain = "all"
        if config.domain_column is not None:
            domain = read_name(row[config.domain_column], "domain_column", config.domain_column, location)
        label = _read_label(row[config.label_column], config.label_column, location)
        image = read_content(row[config.image_column], table.folder)
        yield Entry(name=location, image=image, label=label, domain=domain, part=part)


def _read_label(value: Any, column: str, location: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        kind = "empty (null)" if value in (None, "") else type(value).__name__
        raise UsageError(f"task.data.label_column: '{column}' of {location} is {kind}, not a whole number or name")
    return str(value)


def _from_hub(name: str, config: ImageDataConfig) -> Iterator[Entry]:
    splits = {config.split: TRAIN} | ({} if config.test_split is None else {config.test_split: TEST})
    for split, part in splits.items():
        yield from _from_rows(open_hub_table(name, config.config, split=split, revision=config.revision), part, config)


def _source_files(config: ImageDataConfig) -> dict[str, Path]:
    """Return the files, all images or all tables, by their path relative to the folder."""
    assert config.path is not None
    root = find_source(config.path)
    if root.is_file():
        files = list_files(root, TABLES)
        if not files:
            allowed = ", ".join(TABLES)
            raise UsageError(f"task.data.path: '{config.path}' must be a folder of images, or end in {allowed}")
        return files
    for endings in (IMAGE_FILES, TABLES):
        files = list_files(root, endings)
        if files:
            return files
    allowed = ", ".join(IMAGE_FILES)
    raise UsageError(f"task.data.path: '{config.path}' has no images ({allowed}) and no table ({', '.join(TABLES)})")


def _files_and_references(config: ImageDataConfig) -> Iterator[tuple[str, Path]]:
    """Yield all files that the content depends on: those of the source and those that tables refer to."""
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
    """Return the endings of the files that are read: tables only if there are no images."""
    return TABLES if config.path is None or _is_table(_source_files(config)) else IMAGE_FILES


def _is_table(files: Mapping[str, Path]) -> bool:
    """Return whether the files, which are all of one kind, are tables."""
    return next(iter(files)).lower().endswith(TABLES)
