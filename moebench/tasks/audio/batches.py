"""Batches of utterances: of similar length side by side, padded to the longest, with parts hidden in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor
from torch.nn import functional

from moebench.tasks.audio.utterances import Utterances


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How much of an utterance is hidden in training: SpecAugment without time warping (arXiv:1904.08779)."""

    num_bands: int
    """Stretches of bands."""
    mels: int
    """Bands of a stretch, at most."""
    num_times: int
    """Stretches of time."""
    frames: int
    """Frames of a stretch, at most; never more than a fifth of the utterance."""

    @property
    def hides(self) -> bool:
        """Is anything hidden?"""
        return self.num_bands > 0 or self.num_times > 0


def train_indices(utterances: Utterances, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the utterances of one training step (int64, batch_size of them), without any state to resume.

    Sample i = step * batch_size + j is place i % U of the order of epoch i // U: each utterance once an epoch.
    """
    num_utterances = len(utterances.domain_U)
    epoch_B, place_B = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), num_utterances)
    index_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(epoch_B[0], epoch_B[-1] + 1):
        mask_B = epoch_B == epoch
        index_B[mask_B] = _order(utterances, batch_size, seed, epoch)[place_B[mask_B]]
    return index_B


def evaluation_indices(utterances: Utterances, per_domain: int | None) -> np.ndarray:
    """Return the utterances of an evaluation (int64), the shortest first: `per_domain`, evenly spaced, or all."""
    chosen = []
    for domain in np.unique(utterances.domain_U):
        index_U = np.flatnonzero(utterances.domain_U == domain)
        count = len(index_U) if per_domain is None else min(per_domain, len(index_U))
        chosen.append(index_U[np.arange(count) * len(index_U) // count])
    index_U = np.concatenate(chosen)
    return index_U[np.argsort(utterances.num_frames_U[index_U], kind="stable")]


def padded_frames(utterances: Utterances, index_B: np.ndarray, num_frames: int) -> np.ndarray:
    """Return the frames [B, num_frames, M], as they are stored (fp16), zeros behind the end of each utterance."""
    frames_BNM = np.zeros((len(index_B), num_frames, utterances.frames_NM.shape[1]), utterances.frames_NM.dtype)
    for row, index in enumerate(index_B):
        frames_NM = utterances.frames(index)
        frames_BNM[row, : len(frames_NM)] = frames_NM
    return frames_BNM


def joined(frames_BNM: Tensor, stack: int, context: int) -> Tensor:
    """Return what each position sees, [B, N / stack, (stack + 2 · context) · M]: its frames and their neighbours.

    Beyond both ends are zeros, so that padding an utterance changes nothing.
    """
    around_BNM = functional.pad(frames_BNM, (0, 0, context, context))
    return around_BNM.unfold(1, stack + 2 * context, stack).transpose(2, 3).flatten(2)


def padded_symbols(utterances: Utterances, index_B: np.ndarray) -> np.ndarray:
    """Return the symbols of the utterances [B, S], each 1 more than its number; 0 behind the end."""
    said = [utterances.symbols(index) + 1 for index in index_B]
    symbols_BS = np.zeros((len(said), max(map(len, said), default=0)), dtype=np.int64)
    for row, symbols in enumerate(said):
        symbols_BS[row, : len(symbols)] = symbols
    return symbols_BS


def hidden(
    num_frames_B: np.ndarray, num_frames: int, num_mels: int, masking: Masking, seed: Sequence[int]
) -> np.ndarray:
    """Return where a batch is hidden, bool [B, num_frames, M], as a function of the seed.

    Hidden numbers become 0, the mean of a normalised utterance.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    size = len(num_frames_B)
    band_B = np.full(size, num_mels)
    longest_B = np.minimum(masking.frames, num_frames_B // 5)
    time_BN = _stretches(draw, num_frames_B, longest_B, masking.num_times, num_frames)
    band_BM = _stretches(draw, band_B, np.minimum(masking.mels, band_B), masking.num_bands, num_mels)
    either_BNM: np.ndarray = time_BN[:, :, None] | band_BM[:, None, :]
    return either_BNM


def _stretches(
    draw: np.random.Generator, length_B: np.ndarray, longest_B: np.ndarray, number: int, size: int
) -> np.ndarray:
    """Return the union of `number` stretches in each row: their lengths are uniform in 0 ... longest."""
    shape = (len(length_B), number)
    width_BK = np.floor(draw.random(shape) * (longest_B[:, None] + 1))
    start_BK = np.floor(draw.random(shape) * (length_B[:, None] - width_BK + 1))
    place_N = np.arange(size)
    inside_BKN = (place_N >= start_BK[..., None]) & (place_N < (start_BK + width_BK)[..., None])
    found: np.ndarray = inside_BKN.any(1)
    return found


@lru_cache(maxsize=4)
def _order(utterances: Utterances, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: at random, but the batches that lie inside the epoch are of similar lengths."""
    num_utterances = len(utterances.domain_U)
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order_U = draw.permutation(num_utterances)
    first = -epoch * num_utterances % batch_size  # the rest of a batch that began in the epoch before
    whole = max(num_utterances - first, 0) // batch_size
    inside = slice(first, first + whole * batch_size)
    # Equal lengths stay in random order: batches are mixed anew in every epoch.
    by_length_U = order_U[inside][np.argsort(utterances.num_frames_U[order_U[inside]], kind="stable")]
    order_U[inside] = draw.permutation(by_length_U.reshape(whole, batch_size)).reshape(-1)
    order_U.flags.writeable = False  # it is shared by all callers
    return order_U
