"""Where audio comes from: the embedded pack, local files or a hub, each read into the same clips."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moebench.errors import UsageError, require
from moebench.tasks.audio.features import most_mels
from moebench.tasks.folders import TRAIN, existing, files_below, folders_of, parts_of
from moebench.tasks.sources import check_source, file_digest, first_line
from moebench.tasks.tables import Table, content_of, hub_table, local_table, named, reading, require_alike

PACK = Path(__file__).parent.parent / "data" / "speech_prompts.parquet"
TABLES = (".parquet", ".csv", ".jsonl")
"""A .json beside sounds tells of them more often than it lists them."""
SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au")
AUDIO_COLUMNS = ("audio", "path", "file", "file_name")
OPTIONAL = "language"
"""The column of domains that a source may lack: the default of `domain_column`."""
Target = Literal["transcript", "label"]


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig:
    """Which recordings to train on and how they become features; by default prompts that moebench carries."""

    path: str | None = None
    """Local .parquet file or folder of such files, manifest (.csv, .jsonl) that names audio files, or folder of sounds
    (.wav, .flac, .ogg, .oga, .opus, .mp3, .aiff, .aif, .au) with a .txt of the same name for each, or with a folder per
    class. Where there are tables, they alone say what is read. What lies in folders, or in tables, called train,
    validation (val, valid, dev) and test is not mixed."""
    dataset: str | None = None
    """Name of a data set on the Hugging Face hub, used instead of `path`."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read; it is divided again into train, validation and test."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    audio_column: str | None = None
    """Column of the audio: its bytes, or a path relative to the file that names it; null takes the first of audio,
    path, file and file_name that exists."""
    target_column: str = "text"
    """Column of what is to be recognised: the transcript, or the class."""
    domain_column: str | None = OPTIONAL
    """Column that names the domain; without such a column, or with null, all clips are one domain, 'all'."""
    held_out_domains: list[str] = field(default_factory=list)
    """Domains that are in no training batch and not in the validation set: the test measures them out of domain."""
    group_column: str | None = None
    """Column of the group that may not be divided between train and test (speaker, prompt, book); null keeps each
    clip by itself (the embedded pack brings its prompts). Clips with equal transcripts are always one group."""
    duration_column: str = "duration"
    """Column of the seconds that a clip is cut to, where there is one: some codecs pad their last block."""
    sample_rate: int = 8000
    """Samples per second that every clip is brought to."""
    num_mels: int = 40
    """Bands of the log-mel spectrogram."""
    max_seconds: float = 6.0
    """Clips that are longer are left out, and counted."""
    digits: Literal["drop", "keep"] = "drop"
    """Drop leaves out transcripts with digits, which do not tell how they are read; keep takes them as characters."""
    skip_broken: bool = False
    """Leave out (and count) files that are missing, empty or cannot be decoded, instead of ending with an error."""

    def __post_init__(self) -> None:
        """Refuse values out of range and combinations that have no meaning."""
        check_source(self, ("audio_column", "target_column", "domain_column", "group_column"))
        for name, lowest, highest in (("sample_rate", 4000, 192_000), ("num_mels", 8, 80), ("max_seconds", 0.1, 60)):
            given = getattr(self, name)
            require(lowest <= given <= highest, f"task.data.{name}", given, f"{lowest} to {highest}")
        most, at = most_mels(self.sample_rate), f"at task.data.sample_rate={self.sample_rate}"
        require(
            self.num_mels <= most, "task.data.num_mels", self.num_mels, f"at most {most} {at}, to hold a frequency each"
        )

    @property
    def is_pack(self) -> bool:
        """Whether nothing is named, so that it is the embedded pack."""
        return self.path is None and self.dataset is None

    @property
    def source(self) -> str:
        """The key and the name that an error is about."""
        return f"task.data.dataset: '{self.dataset}'" if self.dataset else f"task.data.path: '{self.path or PACK.name}'"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recording, not decoded yet, what is said in it, its domain and the group it may not be parted from."""

    name: str
    """For messages: the file, or the row."""
    audio: bytes | Path | None
    """None where a row has none."""
    target: str | None
    """The transcript or the class; None where a row has none."""
    domain: str
    group: str
    seconds: float | None = None
    """Length without the codec's padding; None where it is not known."""
    part: str = TRAIN
    """validation or test where the source keeps them apart from what is trained on, or divided."""


def load_clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    """Read the clips of the source one after the other; raise `UsageError` for what cannot be read."""
    if target == "label" and config.is_pack:
        raise UsageError("task.data.path: null was given, and moebench carries no labelled audio; give local files")
    if config.dataset is None:
        yield from _local_clips(config, target)
        return
    try:
        table = hub_table(config.dataset, config.config, split=config.split, revision=config.revision)
        yield from _from_table(table, config, TRAIN)
    except UsageError:
        raise
    except Exception as error:  # a network raises almost anything
        advice = "check task.data.config, split and revision, or give local files with task.data.path=..."
        raise UsageError(f"{config.source} cannot be read ({first_line(error)}); {advice}") from error


def source_digest(config: AudioDataConfig, target: Target) -> str:
    """Return a SHA-256 (hex) of what decides the content: file bytes and fields, never where files lie.

    A hub data set counts by name, configuration, split and revision: pin a commit to identify its bytes.
    """
    fields: dict[str, Any] = {name: value for name, value in vars(config).items() if name != "path"}
    fields |= {"pack": config.is_pack, "target": target, "held_out_domains": sorted(config.held_out_domains)}
    if config.dataset is None:
        files = _files(config)
        tables = _tables(files)
        # Only what is read: another file beside the audio changes nothing.
        read = tables or files | (_transcripts(files) if target == "transcript" else {})
        is_alone = config.path is not None and existing(config.path).is_file()  # then its name says nothing
        fields["files"] = [("" if is_alone else name, file_digest(path)) for name, path in read.items()]
        if not config.is_pack:
            fields["named"] = [
                file_digest(path) for name, path in tables.items() for path in _named(name, path, config)
            ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _files(config: AudioDataConfig) -> dict[str, Path]:
    """Return the tables and sounds of the source by their name inside the folder."""
    if config.path is None:
        return {PACK.name: PACK}
    files = files_below(existing(config.path), (*TABLES, *SOUNDS))
    if not files:
        allowed = ", ".join((*TABLES, *SOUNDS))
        raise UsageError(f"task.data.path: '{config.path}' holds no file that ends in {allowed}")
    return files


def _tables(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name.lower().endswith(TABLES)}


def _transcripts(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the .txt that stands beside each sound, where there is one."""
    beside = {f"{name}: transcript": path.with_suffix(".txt") for name, path in files.items()}
    return {name: path for name, path in beside.items() if path.is_file()}


def _named(name: str, path: Path, config: AudioDataConfig) -> Iterator[Path]:
    """Yield the files that a table names, which it does not hold itself."""
    table = local_table(path, name)
    audio = _columns(table, config)["audio"]
    for _, row in table.read([audio]):
        found = _audio_of(row[audio], table.folder)
        if isinstance(found, Path):
            yield found


def _local_clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    files = _files(config)
    tables = _tables(files)
    parts = parts_of(tables or files, by_file=bool(tables)) if len(files) > 1 else {}
    opened = (local_table(path, name) for name, path in tables.items())
    for table in require_alike(opened, "domain_column", OPTIONAL) if config.domain_column == OPTIONAL else opened:
        yield from _from_table(table, config, parts.get(table.name, TRAIN))
    if not tables:
        for name, path in files.items():
            folders = folders_of(name, divided=bool(parts))
            said = _said(name, path, folders, target)
            domain = folders[0] if target == "transcript" and config.domain_column and folders else "all"
            # Speech Commands names a recording after its speaker, who must not be on both sides.
            speaker, mark, _ = path.stem.partition("_nohash_")
            group = f"group/{speaker}" if mark else f"clip/{name}"
            yield Clip(name=name, audio=path, target=said, domain=domain, group=group, part=parts.get(name, TRAIN))


def _said(name: str, path: Path, folders: list[str], target: Target) -> str:
    """Return the transcript beside a file of a folder without a table, or the class that its first folder names."""
    if target == "label":
        if not folders:
            raise UsageError(f"task.data.path: '{name}' lies in no folder that names its class (CLASS/{path.name})")
        return folders[0]
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise UsageError(
            f"task.data.path: '{name}' has no transcript; give '{text.name}' beside it, or a manifest (.csv)"
        )
    with reading(f"{name}: {text.name}"):
        return text.read_text(encoding="utf-8-sig")


def _from_table(table: Table, config: AudioDataConfig, part: str) -> Iterator[Clip]:
    column_of = _columns(table, config)
    for number, (place, row) in enumerate(table.read(column_of.values())):
        found = {key: row[column] for key, column in column_of.items()}
        names = {
            key: named(found[key], f"{key}_column", column_of[key], place)
            for key in ("domain", "group", "target")
            if key in found and (key != "target" or found[key] not in (None, ""))
        }
        cell = found["audio"]
        audio = _audio_of(cell, table.folder)
        shown = cell.get("path") if isinstance(cell, Mapping) else cell
        yield Clip(
            name=f"{place} ({shown})" if isinstance(shown, str) and len(shown) < 256 else place,
            audio=audio,
            target=names.get("target"),
            domain=names.get("domain", "all"),
            group=f"group/{names['group']}" if "group" in names else f"clip/{table.name}/{number}",
            seconds=_seconds(found.get("duration"), place, config),
            part=part,
        )


def _audio_of(value: Any, folder: Path) -> bytes | Path | None:
    """Return the bytes of a cell, the file that it names, or None for neither."""
    found = content_of(value, folder)
    return found if isinstance(found, bytes | Path) and found else None


def _seconds(value: Any, place: str, config: AudioDataConfig) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(
            f"task.data.duration_column: '{config.duration_column}' of {place} is {value}, no number of seconds;"
            " name another column, or one that there is not"
        )
    return seconds


def _columns(table: Table, config: AudioDataConfig) -> dict[str, str]:
    """Return which column holds what; raise UsageError that lists the columns where one is missing."""
    wanted = {"target": config.target_column}
    if config.audio_column is None:
        wanted["audio"] = next((name for name in AUDIO_COLUMNS if name in table.columns), AUDIO_COLUMNS[0])
    else:
        wanted["audio"] = config.audio_column
    if config.domain_column is not None and (config.domain_column != OPTIONAL or OPTIONAL in table.columns):
        wanted["domain"] = config.domain_column
    group = "prompt" if config.is_pack and config.group_column is None else config.group_column
    wanted |= {} if group is None else {"group": group}
    for key, column in wanted.items():
        table.check(f"{key}_column", column)
    return wanted | ({"duration": config.duration_column} if config.duration_column in table.columns else {})
