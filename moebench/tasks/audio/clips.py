"""Sources of audio: the embedded recordings, local files or the Hugging Face hub, each read into the same clips."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from moebench.errors import UsageError, require
from moebench.ranges import Range, check_ranges
from moebench.tasks.audio.features import max_num_mels
from moebench.tasks.folders import TRAIN, assign_parts, find_source, list_files, list_parent_folders
from moebench.tasks.sources import check_source, file_digest, first_line
from moebench.tasks.tables import (
    Table,
    file_errors,
    open_hub_table,
    open_table,
    read_content,
    read_name,
    require_same_columns,
)

PACK = Path(__file__).parent.parent / "data" / "speech_prompts.parquet"
TABLES = (".parquet", ".csv", ".jsonl")
"""Formats of manifests: a .json beside recordings usually holds metadata, not a list of them."""
AUDIO_FILES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au")
AUDIO_COLUMNS = ("audio", "path", "file", "file_name")
OPTIONAL = "language"
"""Default of `domain_column`: the only column that a source may lack."""
Target = Literal["transcript", "label"]


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig:
    """Which recordings to train on and how they become features; by default the embedded telephone prompts."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "sample_rate": Range(low=4000, high=192_000),
        "num_mels": Range(low=8, high=80),
        "max_seconds": Range(low=0.1, high=60),
    }

    path: str | None = None
    """Local .parquet file or folder of such files, manifest (.csv, .jsonl) that names audio files, or folder of audio
    files (.wav, .flac, .ogg, .oga, .opus, .mp3, .aiff, .aif, .au) with a .txt of the same name for each, or with one
    subfolder per class. If there are tables, only they are read. Folders or tables named train, validation (val, valid,
    dev) and test are kept as splits."""
    dataset: str | None = None
    """Data set on the Hugging Face hub, instead of `path`."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read; it is divided again into train, validation and test."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    audio_column: str | None = None
    """Column of the audio: its bytes, or a path relative to the table; null: the first of audio, path, file and
    file_name that exists."""
    target_column: str = "text"
    """Column of the target: the transcript, or the class."""
    domain_column: str | None = OPTIONAL
    """Column of the domain; if it is missing or null, all clips are of one domain, 'all'."""
    held_out_domains: list[str] = field(default_factory=list)
    """Domains that are excluded from training and validation, and measured out of domain in the test split."""
    group_column: str | None = None
    """Column of the group that is never divided between splits (speaker, prompt, book); null: each clip is a group
    (embedded recordings: each prompt). Clips with equal transcripts are always one group."""
    duration_column: str = "duration"
    """Column of the duration in seconds that a clip is cut to, if it exists: some codecs pad their last block."""
    sample_rate: int = 8000
    """Samples per second; clips with another rate are resampled."""
    num_mels: int = 40
    """Number of mel bands of the log-mel spectrogram."""
    max_seconds: float = 6.0
    """Longer clips are skipped and counted."""
    digits: Literal["drop", "keep"] = "drop"
    """Transcripts with digits, whose pronunciation is ambiguous: drop them, or keep digits as characters."""
    skip_broken: bool = False
    """Skip and count files that are missing, empty or cannot be decoded, instead of failing at the first."""

    def __post_init__(self) -> None:
        check_source(self, ("audio_column", "target_column", "domain_column", "group_column"))
        check_ranges(self, "task.data")
        most, rate = max_num_mels(self.sample_rate), f"task.data.sample_rate={self.sample_rate}"
        require(
            self.num_mels <= most,
            "task.data.num_mels",
            self.num_mels,
            f"at most {most} at {rate}, so that every band has a frequency",
        )

    @property
    def is_pack(self) -> bool:
        """Whether the source is the embedded pack."""
        return self.path is None and self.dataset is None

    @property
    def source(self) -> str:
        """Key and name of the source, as error messages begin."""
        return f"task.data.dataset: '{self.dataset}'" if self.dataset else f"task.data.path: '{self.path or PACK.name}'"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recording before it is decoded, with its target, its domain and its group."""

    name: str
    """File or row, for messages."""
    audio: bytes | Path | None
    """None if a row has no audio."""
    target: str | None
    """The transcript or the class; None if a row has none."""
    domain: str
    group: str
    """Clips of one group are never divided between splits."""
    seconds: float | None = None
    """Length without the padding of the codec; None: unknown."""
    part: str = TRAIN
    """Split that the source assigns; train where it assigns none, and then divided further."""


def load_clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    """Yield the clips of the source; raise UsageError for what cannot be read."""
    if target == "label" and config.is_pack:
        raise UsageError("task.data.path: null was given, but there is no embedded labelled audio; give local files")
    if config.dataset is None:
        yield from _local_clips(config, target)
        return
    try:
        table = open_hub_table(config.dataset, config.config, split=config.split, revision=config.revision)
        yield from _from_table(table, config, TRAIN)
    except UsageError:
        raise
    except Exception as error:  # of many kinds, from the network and its libraries
        advice = "check task.data.config, split and revision, or give local files with task.data.path=..."
        raise UsageError(f"{config.source} cannot be read ({first_line(error)}); {advice}") from error


def source_digest(config: AudioDataConfig, target: Target) -> str:
    """Return a SHA-256 (hex) of the options and file contents that determine the data, independent of paths.

    A hub data set is identified by name, configuration, split and revision: pin a commit to identify its bytes.
    """
    fields: dict[str, Any] = {name: value for name, value in vars(config).items() if name != "path"}
    fields |= {"pack": config.is_pack, "target": target, "held_out_domains": sorted(config.held_out_domains)}
    if config.dataset is None:
        files = _source_files(config)
        tables = _select_tables(files)
        # Only files that are read: others beside the audio change nothing.
        inputs = tables or files | (_transcript_files(files) if target == "transcript" else {})
        is_single_file = config.path is not None and find_source(config.path).is_file()  # its name does not matter
        fields["files"] = [("" if is_single_file else name, file_digest(path)) for name, path in inputs.items()]
        if not config.is_pack:
            fields["named"] = [
                file_digest(path)
                for name, path in tables.items()
                for path in _list_referenced_files(name, path, config)
            ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _source_files(config: AudioDataConfig) -> dict[str, Path]:
    """Return the tables and audio files of the source, by their name relative to the folder."""
    if config.path is None:
        return {PACK.name: PACK}
    files = list_files(find_source(config.path), (*TABLES, *AUDIO_FILES))
    if not files:
        allowed = ", ".join((*TABLES, *AUDIO_FILES))
        raise UsageError(f"task.data.path: '{config.path}' has no file that ends in {allowed}")
    return files


def _select_tables(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name.lower().endswith(TABLES)}


def _transcript_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the .txt file beside each audio file, where it exists."""
    beside = {f"{name}: transcript": path.with_suffix(".txt") for name, path in files.items()}
    return {name: path for name, path in beside.items() if path.is_file()}


def _list_referenced_files(name: str, path: Path, config: AudioDataConfig) -> Iterator[Path]:
    """Yield the audio files that a table refers to."""
    table = open_table(path, name)
    audio = _columns(table, config)["audio"]
    for _, row in table.read([audio]):
        content = _read_audio_cell(row[audio], table.folder)
        if isinstance(content, Path):
            yield content


def _local_clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    files = _source_files(config)
    tables = _select_tables(files)
    parts = assign_parts(tables or files, by_file=bool(tables)) if len(files) > 1 else {}
    opened = (open_table(path, name) for name, path in tables.items())
    has_optional = config.domain_column == OPTIONAL
    for table in require_same_columns(opened, "domain_column", OPTIONAL) if has_optional else opened:
        yield from _from_table(table, config, parts.get(table.name, TRAIN))
    if not tables:
        for name, path in files.items():
            folders = list_parent_folders(name, divided=bool(parts))
            text = _read_target(name, path, folders, target)
            domain = folders[0] if target == "transcript" and config.domain_column and folders else "all"
            # Speech Commands names a recording after its speaker, who must not be in two splits.
            speaker, mark, _ = name.rpartition("/")[2].rpartition(".")[0].partition("_nohash_")
            group = f"group/{speaker}" if mark else f"clip/{name}"
            yield Clip(name=name, audio=path, target=text, domain=domain, group=group, part=parts.get(name, TRAIN))


def _read_target(name: str, path: Path, folders: list[str], target: Target) -> str:
    """Return the transcript in the .txt file beside an audio file, or the class that its first folder names."""
    if target == "label":
        if not folders:
            raise UsageError(f"task.data.path: '{name}' is in no folder that names its class (CLASS/{path.name})")
        return folders[0]
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise UsageError(
            f"task.data.path: '{name}' has no transcript; give '{text.name}' beside it, or a manifest (.csv)"
        )
    with file_errors(f"{name}: {text.name}"):
        return text.read_text(encoding="utf-8-sig")


def _from_table(table: Table, config: AudioDataConfig, part: str) -> Iterator[Clip]:
    column_of = _columns(table, config)
    for number, (location, row) in enumerate(table.read(column_of.values())):
        cells = {key: row[column] for key, column in column_of.items()}
        names = {
            key: read_name(cells[key], f"{key}_column", column_of[key], location)
            for key in ("domain", "group", "target")
            if key in cells and (key != "target" or cells[key] not in (None, ""))
        }
        cell = cells["audio"]
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        yield Clip(
            name=f"{location} ({path})" if isinstance(path, str) and len(path) < 256 else location,
            audio=_read_audio_cell(cell, table.folder),
            target=names.get("target"),
            domain=names.get("domain", "all"),
            group=f"group/{names['group']}" if "group" in names else f"clip/{table.name}/{number}",
            seconds=_read_seconds(cells.get("duration"), location, config),
            part=part,
        )


def _read_audio_cell(value: Any, folder: Path) -> bytes | Path | None:
    """Return the bytes in a cell, or the file that it names; None if it has neither."""
    content = read_content(value, folder)
    return content if isinstance(content, bytes | Path) and content else None


def _read_seconds(value: Any, location: str, config: AudioDataConfig) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(
            f"task.data.duration_column: '{config.duration_column}' of {location} is {value}, not a number of"
            " seconds; name another column, or one that does not exist"
        )
    return seconds


def _columns(table: Table, config: AudioDataConfig) -> dict[str, str]:
    """Return the column of each kind of value; raise UsageError with the existing columns if one is missing."""
    columns = {"target": config.target_column}
    if config.audio_column is None:
        columns["audio"] = next((name for name in AUDIO_COLUMNS if name in table.columns), AUDIO_COLUMNS[0])
    else:
        columns["audio"] = config.audio_column
    if config.domain_column is not None and (config.domain_column != OPTIONAL or OPTIONAL in table.columns):
        columns["domain"] = config.domain_column
    group = "prompt" if config.is_pack and config.group_column is None else config.group_column
    columns |= {} if group is None else {"group": group}
    for key, column in columns.items():
        table.check(f"{key}_column", column)
    return columns | ({"duration": config.duration_column} if config.duration_column in table.columns else {})
