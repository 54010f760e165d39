"""Features and targets of utterances, split by group: prepared once, cached, and memory-mapped by every run."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.audio.clips import AUDIO_FILES, TABLES, AudioDataConfig, Clip, Target, load_clips, source_digest
from moebench.tasks.audio.features import BrokenAudioError, decode, log_mel, normalise_bands
from moebench.tasks.audio.transcripts import build_alphabet, normalise
from moebench.tasks.cache import Arrays, compute_digest_of_entry, load_or_create
from moebench.tasks.folders import TRAIN, warn_unread_files
from moebench.tasks.sources import check_held_out, warn
from moebench.tasks.text.splits import MIN_GROUPS, SPLITS, assign_splits, merge_groups

FORMAT = 2
"""Part of the name in the cache: raised when the split, the features or the files change."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Utterances:
    """The U utterances of one split, with frames and symbols concatenated."""

    frames_NM: np.ndarray
    """Normalised log-mel frames (float16), memory-mapped."""
    start_U1: np.ndarray
    """First frame of each utterance, and the end of the last one (int64)."""
    symbols_N: np.ndarray
    """Symbols of the targets (int64), indices into `PreparedAudio.symbols`."""
    symbol_start_U1: np.ndarray
    """First symbol of each utterance, and the end of the last one (int64)."""
    domain_U: np.ndarray
    """Domain of each utterance (int64)."""

    @property
    def num_frames_U(self) -> np.ndarray:
        """Number of frames of each utterance."""
        return np.diff(self.start_U1)

    def frames(self, index: int) -> np.ndarray:
        """Return the frames of one utterance, [frames, M]."""
        return self.frames_NM[self.start_U1[index] : self.start_U1[index + 1]]

    def symbols(self, index: int) -> np.ndarray:
        """Return the symbols of one utterance."""
        return self.symbols_N[self.symbol_start_U1[index] : self.symbol_start_U1[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedAudio:
    """The three splits of an audio source."""

    train: Utterances
    validation: Utterances
    test: Utterances
    symbols: tuple[str, ...]
    """Characters, or classes."""
    domains: tuple[str, ...]
    num_held_out: int
    """Number of domains, the last ones, that are in the test split only."""
    left_out: dict[str, int]
    """Reason -> number of clips that were left out."""
    digest: str
    """SHA-256 (hex) of features and targets of all splits."""
    eval_digest: str
    """SHA-256 (hex) of the targets of validation and test: unlike `digest` it does not depend on features."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _DecodedClip:
    clip: Clip
    frames_NM: np.ndarray
    target: str


def prepare(config: AudioDataConfig, cache: Path, target: Target) -> PreparedAudio:
    """Return the utterances of a source from the cache, computing them first if needed; safe in parallel processes.

    Computing features takes 29 MB of memory per hour of audio. Raises UsageError for a source that cannot be read or
    split.
    """
    folder = cache / f"audio-{source_digest(config, target)[:24]}-{FORMAT}"
    meta, arrays = load_or_create(folder, lambda: _compute_features(config, target))
    return PreparedAudio(
        **{name: _read_split(name, arrays) for name in SPLITS},
        symbols=tuple(meta["symbols"]),
        domains=tuple(meta["domains"]),
        num_held_out=len(config.held_out_domains),
        left_out=meta["left_out"],
        digest=meta["digest"],
        eval_digest=meta["eval_digest"],
    )


def _read_split(name: str, arrays: Arrays) -> Utterances:
    frames_NM, *others = (arrays[f"{name}-{part}"] for part in ("frames", "start", "symbols", "symbol-start", "domain"))
    start_U1, symbols_N, symbol_start_U1, domain_U = (np.asarray(array) for array in others)
    return Utterances(
        frames_NM=frames_NM,
        start_U1=start_U1,
        symbols_N=symbols_N,
        symbol_start_U1=symbol_start_U1,
        domain_U=domain_U,
    )


def _compute_features(config: AudioDataConfig, target: Target) -> tuple[dict[str, Any], Arrays]:
    left_out: Counter[str] = Counter()
    clips = list(_decode_clips(load_clips(config, target), config, target, left_out))
    if not clips:
        reason = _format_counts(left_out) or "it is empty"
        raise UsageError(f"{config.source} has no clips to train on ({reason}); give others with task.data.path=...")
    warn_unread_files(config.path, (*TABLES, *AUDIO_FILES, *((".txt",) if target == "transcript" else ())))
    if left_out:
        warn(f"of {len(clips) + left_out.total()} clips left out: {_format_counts(left_out)}")
    split_of = _assign_splits(clips, target)
    known = sorted({c.clip.domain for c in clips})
    held_out = check_held_out(config.held_out_domains, known)
    members = {name: [c for c, split in zip(clips, split_of, strict=True) if split == name] for name in SPLITS}
    for name in ("train", "validation"):
        members[name] = [c for c in members[name] if c.clip.domain not in held_out]
    if held_out and target == "label":
        _require_all_classes(clips, members)
    train_targets = [c.target for c in members["train"]]
    symbols = build_alphabet(train_targets) if target == "transcript" else sorted(set(train_targets))
    _check_splits(members, symbols, config, target)
    domains = [domain for domain in known if domain not in held_out] + held_out
    arrays = {
        f"{name}-{part}": array
        for name in SPLITS
        for part, array in _to_arrays(members[name], symbols, domains, target).items()
    }
    meta: dict[str, Any] = {"symbols": symbols, "domains": domains, "left_out": dict(left_out)}
    targets = {name: a for name, a in arrays.items() if not name.startswith("train") and not name.endswith("frames")}
    meta["eval_digest"] = compute_digest_of_entry({"symbols": symbols, "domains": domains}, targets)
    return meta, arrays


def _format_counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))


def _decode_clips(
    clips: Iterable[Clip], config: AudioDataConfig, target: Target, left_out: Counter[str]
) -> Iterable[_DecodedClip]:
    """Yield the usable clips; count the others in `left_out`, by reason."""
    for clip in clips:
        try:
            if clip.target is None:
                raise BrokenAudioError(f"no {target}")
            samples_S = decode(clip.audio, config.sample_rate, clip.seconds, config.max_seconds)
        except BrokenAudioError as error:
            if config.skip_broken:
                left_out["broken"] += 1
                continue
            advice = "repair it, or skip such clips with task.data.skip_broken=true"
            raise UsageError(f"{config.source}: {clip.name} cannot be used ({error}); {advice}") from error
        text = normalise(clip.target) if target == "transcript" else clip.target
        reason = _rejection_reason(text, len(samples_S) / config.sample_rate, config, target)
        if reason:
            left_out[reason] += 1
            continue
        mel_NM = normalise_bands(log_mel(samples_S, config.sample_rate, config.num_mels))
        yield _DecodedClip(clip=replace(clip, audio=None), frames_NM=mel_NM.numpy().astype(np.float16), target=text)


def _rejection_reason(text: str, seconds: float, config: AudioDataConfig, target: Target) -> str | None:
    if not text:
        return f"without a {target}"
    if seconds > config.max_seconds:
        return f"longer than {config.max_seconds:g} s"
    if target == "transcript" and config.digits == "drop" and any(c.isdigit() for c in text):
        return "with digits in the transcript"
    return None


def _assign_splits(clips: Sequence[_DecodedClip], target: Target) -> list[str]:
    """Return the split of each clip: that of the source, or else a part of what the source calls train."""
    given = {c.clip.part for c in clips} - {TRAIN}
    if len(given) == len(SPLITS) - 1:
        return [c.clip.part for c in clips]
    assigned = iter(_divide([c for c in clips if c.clip.part == TRAIN], target))
    splits = [next(assigned) if c.clip.part == TRAIN else c.clip.part for c in clips]
    # The share of a split that the source has already is trained on.
    return [TRAIN if split in given and c.clip.part == TRAIN else split for c, split in zip(clips, splits, strict=True)]


def _divide(clips: Sequence[_DecodedClip], target: Target) -> list[str]:
    is_label = target == "label"
    # No two splits have the same text; of classes, whose texts are equal, the same recording.
    content = [hashlib.sha256(c.frames_NM.data).hexdigest() if is_label else c.target for c in clips]
    pairs = [(c.clip.group, key) for c, key in zip(clips, content, strict=True)]
    groups = [f"group/{name}" for name in merge_groups(pairs)]
    if is_label:
        groups_with: defaultdict[str, set[str]] = defaultdict(set)
        for c, group in zip(clips, groups, strict=True):
            groups_with[c.target].add(group)
        for name, members in sorted(groups_with.items()):
            if len(members) < MIN_GROUPS:
                raise UsageError(
                    f"task.data.target_column: class '{name}' has {len(members)} group(s) of different clips; train,"
                    f" validation and test need {MIN_GROUPS}"
                )
    strata = [c.target if is_label else c.clip.domain for c in clips]
    return assign_splits(groups, strata, [len(c.frames_NM) for c in clips])


def _require_all_classes(clips: Sequence[_DecodedClip], members: Mapping[str, Sequence[_DecodedClip]]) -> None:
    for name in ("train", "validation"):
        missing = sorted({c.target for c in clips} - {c.target for c in members[name]})
        if missing:
            raise UsageError(
                f"task.data.held_out_domains: class '{missing[0]}' is then missing in {name}; hold out domains whose "
                "classes other domains have too"
            )


def _check_splits(
    members: dict[str, list[_DecodedClip]], symbols: Sequence[str], config: AudioDataConfig, target: Target
) -> None:
    """Raise UsageError for empty splits, untrained classes and a single class; warn of test clips in training."""
    trained = {c.frames_NM.tobytes() for c in members[TRAIN]}
    for name, clips in members.items():
        if not clips:
            raise UsageError(f"{config.source} leaves no clips for {name}")
        unseen = sorted({c.target for c in clips} - set(symbols)) if target == "label" else []
        if unseen:
            raise UsageError(f"task.data.target_column: class '{unseen[0]}' has clips for {name} and none to train on")
        repeated = sum(c.frames_NM.tobytes() in trained for c in clips) if name != TRAIN else 0
        if repeated:
            warn(f"{repeated} of {len(clips)} {name} clips are also in the training split, sample for sample")
    if target == "label" and len(symbols) < 2:
        raise UsageError(f"task.data.target_column: all clips are of one class, '{symbols[0]}'; give at least two")


def _to_arrays(
    members: Sequence[_DecodedClip], symbols: Sequence[str], domains: Sequence[str], target: Target
) -> Arrays:
    number = {symbol: i for i, symbol in enumerate(symbols)}
    if target == "transcript":
        targets = [[number.get(character, 0) for character in c.target] for c in members]
    else:
        targets = [[number[c.target]] for c in members]
    return {
        "frames": np.concatenate([c.frames_NM for c in members]),
        "start": np.cumsum([0, *(len(c.frames_NM) for c in members)], dtype=np.int64),
        "symbols": np.array([symbol for symbols_S in targets for symbol in symbols_S], dtype=np.int64),
        "symbol-start": np.cumsum([0, *map(len, targets)], dtype=np.int64),
        "domain": np.array([domains.index(c.clip.domain) for c in members], dtype=np.int64),
    }
