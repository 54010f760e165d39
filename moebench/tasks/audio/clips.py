"""Where audio comes from: the embedded pack, local files or a hub, each read into the same clips."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moebench.errors import UsageError, nearest, require
from moebench.tasks.audio.tables import SOUNDS, TABLES, Table, folder_rows, hub_table, local_table, named_files
from moebench.tasks.sources import check_source, file_digest, first_line

PACK = Path(__file__).parent.parent / "data" / "speech_prompts.parquet"
AUDIO_COLUMNS = ("audio", "path", "file", "file_name")
Target = Literal["transcript", "label"]


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig:
    """Which recordings to train on and how they become features; by default prompts that moebench carries."""

    path: str | None = None
    """Local .parquet file or folder of such files, manifest (.csv, .jsonl) that names audio files, or folder of
    .wav, .flac, .ogg files with such a manifest, with a .txt of the same name for each, or with a folder per class."""
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
    domain_column: str | None = "language"
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


def load_clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    """Read the clips of the source one after the other; raise `UsageError` for what cannot be read."""
    if target == "label" and config.is_pack:
        raise UsageError("task.data.path: null was given, and moebench carries no labelled audio; give local files")
    try:
        yield from _clips(config, target)
    except UsageError:
        raise
    except Exception as error:  # the readers of three formats and a network raise almost anything
        advice = (
            "check task.data.config, split and revision, or give local files with task.data.path=..."
            if config.dataset
            else "give task.data.path=... a whole .parquet, .csv or .jsonl file or a folder of audio files"
        )
        raise UsageError(f"{config.source} cannot be read ({first_line(error)}); {advice}") from error


def source_digest(config: AudioDataConfig, target: Target) -> str:
    """Return a SHA-256 (hex) of what decides the content: file bytes and fields, never where files lie.

    A hub data set counts by name, configuration, split and revision: pin a commit to identify its bytes.
    """
    fields: dict[str, Any] = {name: value for name, value in vars(config).items() if name != "path"}
    fields |= {"pack": config.is_pack, "target": target, "held_out_domains": sorted(config.held_out_domains)}
    if config.dataset is None:
        # Only what is read: another file beside the audio changes nothing.
        root = _root(config)
        kinds = (".txt",) if target == "transcript" else ()
        files = named_files(root, (*TABLES, *SOUNDS, *kinds))
        if root.is_file() and root.suffix.lower() != ".parquet":
            files |= named_files(root.parent, SOUNDS)
        fields["files"] = [(name, file_digest(path)) for name, path in files.items()]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _root(config: AudioDataConfig) -> Path:
    if config.path is None:
        return PACK
    root = Path(config.path).expanduser()
    if not root.exists():
        near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
        raise UsageError(f"task.data.path: '{config.path}' does not exist.{near}")
    return root


def _clips(config: AudioDataConfig, target: Target) -> Iterator[Clip]:
    if config.dataset is not None:
        table = hub_table(config.dataset, config.config, split=config.split, revision=config.revision)
        yield from _from_table(table, config)
        return
    root = _root(config)
    files = named_files(root, (*TABLES, *SOUNDS))
    tables = {name: path for name, path in files.items() if path.suffix.lower() in TABLES}
    if not files:
        allowed = ", ".join((*TABLES, *SOUNDS))
        raise UsageError(f"task.data.path: '{config.path}' holds no file that ends in {allowed}")
    if tables:
        for path in tables.values():
            yield from _from_table(local_table(path), config)
        return
    for row in folder_rows(root, files, target):
        domain = row.domain if config.domain_column and row.domain else "all"
        yield Clip(name=row.name, audio=row.path, target=row.target, domain=domain, group=f"clip/{row.name}")


def _from_table(table: Table, config: AudioDataConfig) -> Iterator[Clip]:
    column_of = _columns(table, config)
    for number, row in enumerate(table.rows(list(dict.fromkeys(column_of.values())))):
        name = f"{table.name} row {number}"
        found = {key: row[column] for key, column in column_of.items()}
        for key in ("domain", "group"):
            if found.get(key, "") is None:
                raise UsageError(f"task.data.{key}_column: {name} of '{column_of[key]}' is empty (null)")
        audio = found["audio"]
        if isinstance(audio, Mapping):  # as the hub stores audio
            name = f"{name} ({audio.get('path')})" if audio.get("path") else name
            audio = audio.get("bytes") or audio.get("path")
        if isinstance(audio, str):
            name, audio = audio, table.folder / audio
        seconds = found.get("duration")
        yield Clip(
            name=name,
            audio=audio if audio else None,
            target=None if found["target"] is None else str(found["target"]),
            domain=str(found.get("domain", "all")),
            group=f"group/{found['group']}" if "group" in found else f"clip/{table.name}/{number}",
            seconds=None if seconds in (None, "") else float(seconds),
        )


def _columns(table: Table, config: AudioDataConfig) -> dict[str, str]:
    """Return which column holds what; raise UsageError that lists the columns where one is missing."""
    wanted = {"target": config.target_column}
    if config.audio_column is None:
        wanted["audio"] = next((name for name in AUDIO_COLUMNS if name in table.columns), AUDIO_COLUMNS[0])
    else:
        wanted["audio"] = config.audio_column
    if config.domain_column is not None and (config.domain_column != "language" or "language" in table.columns):
        wanted["domain"] = config.domain_column
    group = "prompt" if config.is_pack and config.group_column is None else config.group_column
    wanted |= {} if group is None else {"group": group}
    for key, column in wanted.items():
        if column not in table.columns:
            known = f"columns of {table.name}: {', '.join(table.columns)}"
            raise UsageError(
                f"task.data.{key}_column: there is no column '{column}'.{nearest(column, table.columns)} {known}"
            )
    return wanted | ({"duration": config.duration_column} if config.duration_column in table.columns else {})
