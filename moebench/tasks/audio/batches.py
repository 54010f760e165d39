"""Batches of utterances: grouped by length, padded to the longest, masked in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor
from torch.nn import functional

from moebench.tasks.audio.utterances import Utterances


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Number and width of masks in training: SpecAugment without time warping (arXiv:1904.08779)."""

    num_band_masks: int
    max_bands: int
    """Largest width of a mask, in mel bands."""
    num_time_masks: int
    max_frames: int
    """Largest width of a mask, in frames; never more than a fifth of the utterance."""

    @property
    def is_active(self) -> bool:
        """Whether there is any mask."""
        return self.num_band_masks > 0 or self.num_time_masks > 0


def train_indices(utterances: Utterances, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the utterances of one training step (int64 [batch_size]), a function of the arguments only.

    Sample i = step * batch_size + j is at position i % U in the order of epoch i // U: each utterance once per epoch.
    """
    num_utterances = len(utterances.domain_U)
    epoch_B, position_B = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), num_utterances)
    index_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(epoch_B[0], epoch_B[-1] + 1):
        in_epoch_B = epoch_B == epoch
        index_B[in_epoch_B] = _epoch_order(utterances, batch_size, seed, epoch)[position_B[in_epoch_B]]
    return index_B


def evaluation_indices(utterances: Utterances, per_domain: int | None) -> np.ndarray:
    """Return evenly spaced utterances (int64), shortest first: `per_domain` of each domain, all if None."""
    chosen = []
    for domain in np.unique(utterances.domain_U):
        index_U = np.flatnonzero(utterances.domain_U == domain)
        count = len(index_U) if per_domain is None else min(per_domain, len(index_U))
        chosen.append(index_U[np.arange(count) * len(index_U) // count])
    index_U = np.concatenate(chosen)
    return index_U[np.argsort(utterances.num_frames_U[index_U], kind="stable")]


def pad_frames(utterances: Utterances, index_B: np.ndarray, num_frames: int) -> np.ndarray:
    """Return the frames [B, num_frames, M] (fp16), zero after the end of each utterance."""
    frames_BNM = np.zeros((len(index_B), num_frames, utterances.frames_NM.shape[1]), utterances.frames_NM.dtype)
    for row, index in enumerate(index_B):
        frames_NM = utterances.frames(index)
        frames_BNM[row, : len(frames_NM)] = frames_NM
    return frames_BNM


def stack_frames(frames_BNM: Tensor, stack: int, context: int) -> Tensor:
    """Return the input of each position, [B, N / stack, (stack + 2 · context) · M]: its frames and their neighbours.

    There are zeros beyond both ends, as in the padding of an utterance.
    """
    padded_BNM = functional.pad(frames_BNM, (0, 0, context, context))
    return padded_BNM.unfold(1, stack + 2 * context, stack).transpose(2, 3).flatten(2)


def pad_symbols(utterances: Utterances, index_B: np.ndarray) -> np.ndarray:
    """Return the symbols [B, S] of the utterances, numbered from 1; 0 after the end."""
    transcripts = [utterances.symbols(index) + 1 for index in index_B]
    symbols_BS = np.zeros((len(transcripts), max(map(len, transcripts), default=0)), dtype=np.int64)
    for row, symbols in enumerate(transcripts):
        symbols_BS[row, : len(symbols)] = symbols
    return symbols_BS


def draw_masks(
    num_frames_B: np.ndarray, num_frames: int, num_mels: int, masking: Masking, seed: Sequence[int]
) -> np.ndarray:
    """Return the masked entries of a batch, bool [B, num_frames, M], a function of the seed.

    Masked entries become 0, the mean of a normalised utterance.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    size = len(num_frames_B)
    band_B = np.full(size, num_mels)
    longest_B = np.minimum(masking.max_frames, num_frames_B // 5)
    time_BN = _draw_intervals(draw, num_frames_B, longest_B, masking.num_time_masks, num_frames)
    band_BM = _draw_intervals(draw, band_B, np.minimum(masking.max_bands, band_B), masking.num_band_masks, num_mels)
    either_BNM: np.ndarray = time_BN[:, :, None] | band_BM[:, None, :]
    return either_BNM


def _draw_intervals(
    draw: np.random.Generator, length_B: np.ndarray, longest_B: np.ndarray, number: int, size: int
) -> np.ndarray:
    """Return the union of `number` intervals per row, bool [B, size]: their widths are uniform in 0 ... longest."""
    shape = (len(length_B), number)
    width_BK = np.floor(draw.random(shape) * (longest_B[:, None] + 1))
    start_BK = np.floor(draw.random(shape) * (length_B[:, None] - width_BK + 1))
    position_N = np.arange(size)
    inside_BKN = (position_N >= start_BK[..., None]) & (position_N < (start_BK + width_BK)[..., None])
    union_BN: np.ndarray = inside_BKN.any(1)
    return union_BN


@lru_cache(maxsize=4)
def _epoch_order(utterances: Utterances, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: random, but each batch inside the epoch has utterances of similar lengths."""
    num_utterances = len(utterances.domain_U)
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order_U = draw.permutation(num_utterances)
    first = -epoch * num_utterances % batch_size  # the remaining items of a batch that began in the previous epoch
    num_batches = max(num_utterances - first, 0) // batch_size
    inside = slice(first, first + num_batches * batch_size)
    # Equal lengths stay in random order, so that batches differ between epochs.
    by_length_U = order_U[inside][np.argsort(utterances.num_frames_U[order_U[inside]], kind="stable")]
    order_U[inside] = draw.permutation(by_length_U.reshape(num_batches, batch_size)).reshape(-1)
    order_U.flags.writeable = False  # it is shared by all callers
    return order_U
