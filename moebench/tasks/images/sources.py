"""Where images come from: the embedded sets, folders, tables or a hub, each read into the same entries."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, nearest
from moebench.tasks.images.config import EMBEDDED, ImageDataConfig
from moebench.tasks.sources import file_digest, load_dataset

PACK = Path(__file__).parent.parent / "data"
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = (".parquet", ".csv")
PARTS = ("train", "test")
NOT_SOURCE = ("path", "held_out_classes")
"""Options that leave the prepared arrays as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One image before it is decoded."""

    name: str
    """File or row: what an error names."""
    image: Any
    """Encoded bytes, or the path of a file."""
    label: str | int
    domain: str = "all"
    part: str = ""
    """train or test where the source keeps them apart, else empty."""


def read_entries(config: ImageDataConfig) -> list[Entry]:
    """Return all images of the source in its order; raise `UsageError` for what cannot be read."""
    name = config.dataset or config.path
    try:
        entries = list(_entries(config))
    except UsageError:
        raise
    except Exception as error:  # the readers of three formats and a network raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = (
            "check task.data.config, split and revision, or give local files with task.data.path=..."
            if config.dataset
            else "give task.data.path=... a folder of class folders, or a whole .parquet or .csv file"
        )
        raise UsageError(f"{config.key}: '{name}' cannot be read ({reason}); {advice}") from error
    if not entries:
        raise UsageError(f"{config.key}: '{name}' holds no images")
    return entries


def class_names(entries: Sequence[Entry], config: ImageDataConfig) -> list[str | int]:
    """Return the labels in the order of the classes: of the embedded sets their own, else sorted."""
    if config.is_embedded:
        return [f"{source}/{name}" for source in config.sources for name in EMBEDDED[source]]
    labels = {entry.label for entry in entries}
    if len({type(label) for label in labels}) > 1:
        raise UsageError(f"task.data.label_column: '{config.label_column}' mixes numbers and names; use one of them")
    return sorted(labels)


def source_digest(config: ImageDataConfig) -> str:
    """Return a cheap SHA-256 (hex) of what decides the arrays: file bytes and options, never where files lie.

    A hub data set counts by name, configuration, splits and revision: pin a commit to identify its bytes.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_SOURCE}
    if not config.is_embedded:
        fields["sources"] = None
    if config.dataset is None:
        fields["files"] = [[name, _digest_or_none(path)] for name, path in _files_and_references(config)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _entries(config: ImageDataConfig) -> Iterator[Entry]:
    if config.is_embedded:
        yield from _embedded(config)
    elif config.dataset is not None:
        yield from _hub(config)
    else:
        files = _source_files(config)
        if _is_table(files):
            for name, path in files.items():
                yield from _from_rows(_table_rows(path, config), path, _part_of(name, files), config)
        else:
            yield from _from_folder(files, config)


def _embedded(config: ImageDataConfig) -> Iterator[Entry]:
    import pyarrow.parquet as pq

    for source in config.sources:
        for part in PARTS:
            rows = pq.read_table(PACK / f"{source}_{part}.parquet").to_pylist()
            for number, row in enumerate(rows):
                label = f"{source}/{EMBEDDED[source][row['label']]}"
                name = f"{source}_{part}, row {number}"
                yield Entry(name=name, image=row["image"]["bytes"], label=label, domain=source, part=part)


def _from_folder(files: Mapping[str, Path], config: ImageDataConfig) -> Iterator[Entry]:
    assert config.path is not None
    divided = {name.split("/")[0] for name in files} == {*PARTS}
    depth = 1 if divided else 0
    seen = set()
    for name, path in files.items():
        folders = name.split("/")[:-1]
        if len(folders) <= depth:
            raise UsageError(f"task.data.path: '{name}' lies in no class folder; put each image into one")
        seen.add("/".join(folders[: depth + 1]))
        yield Entry(name=name, image=path, label=folders[depth], part=folders[0] if divided else "")
    root = Path(config.path).expanduser()
    above = [root / part for part in PARTS] if divided else [root]
    folders = [p.relative_to(root).as_posix() for top in above for p in sorted(top.iterdir()) if p.is_dir()]
    empty = [name for name in folders if name not in seen and not name.startswith((".", "_"))]
    if empty and not config.skip_broken:
        raise UsageError(f"task.data.path: folder '{empty[0]}' holds no images; remove it, or set skip_broken=true")


def _from_rows(rows: Sequence[Mapping[str, Any]], base: Path, part: str, config: ImageDataConfig) -> Iterator[Entry]:
    for number, row in enumerate(rows):
        name = f"{base.name}, row {number}"
        label = row[config.label_column]
        if isinstance(label, bool) or not isinstance(label, int | str):
            kind = "empty (null)" if label is None else type(label).__name__
            raise UsageError(f"task.data.label_column: '{config.label_column}' of {name} is {kind}, no number or name")
        domain = "all" if config.domain_column is None else str(row[config.domain_column])
        image = _image_of(row[config.image_column], base)
        yield Entry(name=name, image=image, label=label, domain=domain, part=part)


def _image_of(value: Any, base: Path) -> Any:
    """Return the bytes of a cell, or the path that it names, which may be relative to the table."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return base.parent / Path(value).expanduser() if isinstance(value, str) else value


def _table_rows(path: Path, config: ImageDataConfig) -> Sequence[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        from pyarrow import csv

        table = csv.read_csv(path)
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(path)
    columns = _check_columns(table.column_names, config)
    rows: Sequence[Mapping[str, Any]] = table.select(columns).to_pylist()
    return rows


def _check_columns(known: Sequence[str], config: ImageDataConfig) -> list[str]:
    """Return the columns that are read; raise `UsageError` for one that is not there."""
    wanted = {key: getattr(config, key) for key in ("image_column", "label_column", "domain_column")}
    for key, column in wanted.items():
        if column is not None and column not in known:
            columns = f"columns: {', '.join(known)}"
            raise UsageError(f"task.data.{key}: there is no column '{column}'.{nearest(column, known)} {columns}")
    return list(dict.fromkeys(column for column in wanted.values() if column is not None))


def _hub(config: ImageDataConfig) -> Iterator[Entry]:
    splits = {config.split: ""} if config.test_split is None else {config.split: "train", config.test_split: "test"}
    for split, part in splits.items():
        data = load_dataset(config.dataset, config.config, split=split, revision=config.revision)
        columns = _check_columns(data.column_names, config)
        import datasets

        if isinstance(data.features[config.image_column], datasets.Image):
            # Undecoded: a broken image is then ours to name or to leave out.
            data = data.cast_column(config.image_column, datasets.Image(decode=False))
        yield from _from_rows(data.select_columns(columns), Path(f"{config.dataset}/{split}"), part, config)


def _source_files(config: ImageDataConfig) -> dict[str, Path]:
    """Return the files by their name inside the folder, all images or all tables."""
    assert config.path is not None
    root = Path(config.path).expanduser()
    if root.is_file():
        if root.suffix.lower() not in TABLES:
            raise UsageError(f"task.data.path: '{config.path}' must be a folder of images, or end in .parquet or .csv")
        return {root.name: root}
    if not root.is_dir():
        near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
        raise UsageError(f"task.data.path: '{config.path}' does not exist.{near}")
    found = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
    for endings in (ENDINGS, TABLES):
        files = {p.relative_to(root).as_posix(): p for p in found if p.suffix.lower() in endings}
        if files:
            return files
    raise UsageError(f"task.data.path: '{config.path}' holds no images ({', '.join(ENDINGS)}) and no .parquet or .csv")


def _files_and_references(config: ImageDataConfig) -> Iterator[tuple[str, Path]]:
    """Yield all files that the content depends on: those of the source, and those that tables name."""
    if config.is_embedded:
        names = [f"{source}_{part}.parquet" for source in config.sources for part in PARTS]
        yield from ((name, PACK / name) for name in names)
        return
    files = _source_files(config)
    yield from (("" if len(files) == 1 else name, path) for name, path in files.items())
    if _is_table(files):
        entries = (entry for entry in read_entries(config) if isinstance(entry.image, Path))
        yield from ((f"image {number}", entry.image) for number, entry in enumerate(entries))


def _is_table(files: Mapping[str, Path]) -> bool:
    return next(iter(files.values())).suffix.lower() in TABLES


def _part_of(name: str, files: Mapping[str, Path]) -> str:
    """Return train or test where the names of the tables say so, as in train-0.parquet beside test.parquet."""
    parts = {file: next((part for part in PARTS if file.startswith(part)), "") for file in files}
    return parts[name] if {*parts.values()} == {*PARTS} else ""


def _digest_or_none(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None
