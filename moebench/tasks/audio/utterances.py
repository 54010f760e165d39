"""Features and targets on disk, split by group: prepared once, then read in place by every run."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.audio.clips import SOUNDS, TABLES, AudioDataConfig, Clip, Target, load_clips, source_digest
from moebench.tasks.audio.features import BrokenAudioError, decode, log_mel, normalised
from moebench.tasks.audio.transcripts import alphabet, normalise
from moebench.tasks.cache import Arrays, digest_of, stored
from moebench.tasks.folders import TRAIN, tell_unread
from moebench.tasks.sources import checked_held_out, note
from moebench.tasks.text.splits import MIN_GROUPS, SPLITS, assign_splits, groups_of

FORMAT = 2  # raise it when the split, the features or the files change


@dataclass(frozen=True, kw_only=True, eq=False)
class Utterances:
    """The U utterances of one split: their frames and symbols laid one after the other."""

    frames_NM: np.ndarray
    """Normalised log-mel frames, float16, read in place from disk."""
    start_U1: np.ndarray
    """First frame of each utterance, and the end of the last (int64)."""
    symbols_N: np.ndarray
    """Symbols of the targets (int64), numbered as in `PreparedAudio.symbols`."""
    symbol_start_U1: np.ndarray
    """First symbol of each utterance, and the end of the last (int64)."""
    domain_U: np.ndarray
    """Index of each utterance's domain (int64)."""

    @property
    def num_frames_U(self) -> np.ndarray:
        """Frames of each utterance."""
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
    """How many domains, the last of them, are in the test split alone."""
    left_out: dict[str, int]
    """Why clips were left out -> how many."""
    digest: str
    """SHA-256 (hex) of features and targets of all splits."""
    eval_digest: str
    """The same of what is held out, without the features: it stays when those change."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Heard:
    clip: Clip
    frames_NM: np.ndarray
    target: str


def prepare(config: AudioDataConfig, cache: Path, target: Target) -> PreparedAudio:
    """Return the utterances of a source, from the cache or else made now and cached; safe in parallel processes.

    Features take 29 MB of memory per hour of audio while they are made. Raises `UsageError` for a source that cannot
    be read or divided.
    """
    folder = cache / f"audio-{source_digest(config, target)[:24]}-{FORMAT}"
    meta, arrays = stored(folder, lambda: _features(config, target))
    return PreparedAudio(
        **{name: _split(name, arrays) for name in SPLITS},
        symbols=tuple(meta["symbols"]),
        domains=tuple(meta["domains"]),
        num_held_out=len(config.held_out_domains),
        left_out=meta["left_out"],
        digest=meta["digest"],
        eval_digest=meta["eval_digest"],
    )


def _split(name: str, arrays: Arrays) -> Utterances:
    frames_NM, *others = (arrays[f"{name}-{part}"] for part in ("frames", "start", "symbols", "symbol-start", "domain"))
    start_U1, symbols_N, symbol_start_U1, domain_U = (np.asarray(array) for array in others)
    return Utterances(
        frames_NM=frames_NM,
        start_U1=start_U1,
        symbols_N=symbols_N,
        symbol_start_U1=symbol_start_U1,
        domain_U=domain_U,
    )


def _features(config: AudioDataConfig, target: Target) -> tuple[dict[str, Any], Arrays]:
    left_out: Counter[str] = Counter()
    heard = list(_heard(load_clips(config, target), config, target, left_out))
    if not heard:
        why = _listed(left_out) or "it is empty"
        raise UsageError(f"{config.source} gives no clips to train on ({why}); give task.data.path=... others")
    tell_unread(config.path, (*TABLES, *SOUNDS, *((".txt",) if target == "transcript" else ())))
    if left_out:
        note(f"of {len(heard) + left_out.total()} clips left out: {_listed(left_out)}")
    split_of = _assign(heard, target)
    known = sorted({h.clip.domain for h in heard})
    held_out = checked_held_out(config.held_out_domains, known)
    members = {name: [h for h, split in zip(heard, split_of, strict=True) if split == name] for name in SPLITS}
    for name in ("train", "validation"):
        members[name] = [h for h in members[name] if h.clip.domain not in held_out]
    if held_out and target == "label":
        _refuse_lost_classes(heard, members)
    said = [h.target for h in members["train"]]
    symbols = alphabet(said) if target == "transcript" else sorted(set(said))
    _check_splits(members, symbols, config, target)
    domains = [domain for domain in known if domain not in held_out] + held_out
    arrays = {
        f"{name}-{part}": array
        for name in SPLITS
        for part, array in _arrays(members[name], symbols, domains, target).items()
    }
    meta: dict[str, Any] = {"symbols": symbols, "domains": domains, "left_out": dict(left_out)}
    judged = {name: a for name, a in arrays.items() if not name.startswith("train") and not name.endswith("frames")}
    meta["eval_digest"] = digest_of({"symbols": symbols, "domains": domains}, judged)
    return meta, arrays


def _listed(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))


def _heard(clips: Iterable[Clip], config: AudioDataConfig, target: Target, left_out: Counter[str]) -> Iterable[_Heard]:
    for clip in clips:
        try:
            if clip.target is None:
                raise BrokenAudioError(f"no {target}")
            samples_S = decode(clip.audio, config.sample_rate, clip.seconds, config.max_seconds)
        except BrokenAudioError as error:
            if config.skip_broken:
                left_out["broken"] += 1
                continue
            advice = "mend it, or leave such clips out with task.data.skip_broken=true"
            raise UsageError(f"{config.source}: {clip.name} cannot be used ({error}); {advice}") from error
        said = normalise(clip.target) if target == "transcript" else clip.target
        reason = _why_not(said, len(samples_S) / config.sample_rate, config, target)
        if reason:
            left_out[reason] += 1
            continue
        mel_NM = normalised(log_mel(samples_S, config.sample_rate, config.num_mels))
        yield _Heard(clip=replace(clip, audio=None), frames_NM=mel_NM.numpy().astype(np.float16), target=said)


def _why_not(said: str, seconds: float, config: AudioDataConfig, target: Target) -> str | None:
    if not said:
        return f"without a {target}"
    if seconds > config.max_seconds:
        return f"longer than {config.max_seconds:g} s"
    if target == "transcript" and config.digits == "drop" and any(c.isdigit() for c in said):
        return "with digits in the transcript"
    return None


def _assign(heard: Sequence[_Heard], target: Target) -> list[str]:
    """Return the split of each clip: its own where the source says it; what the source lacks is taken from the rest."""
    given = {h.clip.part for h in heard} - {TRAIN}
    if len(given) == len(SPLITS) - 1:
        return [h.clip.part for h in heard]
    assigned = iter(_divided([h for h in heard if h.clip.part == TRAIN], target))
    splits = [next(assigned) if h.clip.part == TRAIN else h.clip.part for h in heard]
    # A split that the source brings needs no share: that part is trained on too.
    return [TRAIN if split in given and h.clip.part == TRAIN else split for h, split in zip(heard, splits, strict=True)]


def _divided(heard: Sequence[_Heard], target: Target) -> list[str]:
    is_label = target == "label"
    # What may not be on both sides: the same words; of classes, whose words are all alike, the same recording.
    content = [hashlib.sha256(h.frames_NM.data).hexdigest() if is_label else h.target for h in heard]
    groups = [f"group/{name}" for name in groups_of([(h.clip.group, c) for h, c in zip(heard, content, strict=True)])]
    if is_label:
        groups_with: defaultdict[str, set[str]] = defaultdict(set)
        for h, group in zip(heard, groups, strict=True):
            groups_with[h.target].add(group)
        for name, found in sorted(groups_with.items()):
            if len(found) < MIN_GROUPS:
                raise UsageError(
                    f"task.data.target_column: class '{name}' has {len(found)} group(s) of different clips; train,"
                    f" validation and test need {MIN_GROUPS}"
                )
    strata = [h.target if is_label else h.clip.domain for h in heard]
    return assign_splits(groups, strata, [len(h.frames_NM) for h in heard])


def _refuse_lost_classes(heard: Sequence[_Heard], members: Mapping[str, Sequence[_Heard]]) -> None:
    for name in ("train", "validation"):
        lost = sorted({h.target for h in heard} - {h.target for h in members[name]})
        if lost:
            raise UsageError(
                f"task.data.held_out_domains: class '{lost[0]}' is then missing in {name}; hold out domains whose "
                "classes others have too"
            )


def _check_splits(
    members: dict[str, list[_Heard]], symbols: Sequence[str], config: AudioDataConfig, target: Target
) -> None:
    """Refuse splits of nothing and classes that are not trained on or alone; count what is trained on too."""
    trained = {h.frames_NM.tobytes() for h in members[TRAIN]}
    for name, found in members.items():
        if not found:
            raise UsageError(f"{config.source} leaves no clips for {name}")
        unseen = sorted({h.target for h in found} - set(symbols)) if target == "label" else []
        if unseen:
            raise UsageError(f"task.data.target_column: class '{unseen[0]}' has clips for {name} and none to train on")
        repeated = sum(h.frames_NM.tobytes() in trained for h in found) if name != TRAIN else 0
        if repeated:
            note(f"{repeated} of {len(found)} {name} clips are trained on too, sample for sample")
    if target == "label" and len(symbols) < 2:
        raise UsageError(f"task.data.target_column: all clips are of one class, '{symbols[0]}'; give at least two")


def _arrays(members: Sequence[_Heard], symbols: Sequence[str], domains: Sequence[str], target: Target) -> Arrays:
    number = {symbol: i for i, symbol in enumerate(symbols)}
    targets = [[number.get(c, 0) for c in h.target] if target == "transcript" else [number[h.target]] for h in members]
    return {
        "frames": np.concatenate([h.frames_NM for h in members]),
        "start": np.cumsum([0, *(len(h.frames_NM) for h in members)], dtype=np.int64),
        "symbols": np.array([symbol for said in targets for symbol in said], dtype=np.int64),
        "symbol-start": np.cumsum([0, *map(len, targets)], dtype=np.int64),
        "domain": np.array([domains.index(h.clip.domain) for h in members], dtype=np.int64),
    }
