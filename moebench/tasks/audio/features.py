"""Decode audio files and compute log-mel spectrograms."""

import io
import math
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moebench.tasks.sources import first_line

WINDOW_S, HOP_S = 0.025, 0.010
FLOOR = 1e-6
"""Added to the energy of a band, so that digital silence has a finite logarithm."""

BLOCK = 1 << 20
"""Frames read at once where the length is unknown."""
UNKNOWN_LENGTH = 2**63 - 1
"""Number of frames that libsndfile reports where a file does not say it."""
MAX_SAMPLE = 1e9
"""Floats in the range of 32-bit integers are read; the energy of larger ones would overflow."""


class BrokenAudioError(Exception):
    """Audio is missing, empty or cannot be decoded; the message is the reason in one line."""


def decode(
    audio: bytes | Path | None, sample_rate: int, seconds: float | None = None, longest_s: float = math.inf
) -> np.ndarray:
    """Return the samples of a file (float32, mono) at a sample rate, cut to `seconds` if given.

    At most one second beyond `longest_s` is read. Raises BrokenAudioError if there are no finite samples.
    """
    if audio is None:
        raise BrokenAudioError("no audio")
    samples_SC, rate = _read(audio, longest_s + 1)
    samples_S = samples_SC.mean(1)
    if seconds is not None:
        samples_S = samples_S[: round(seconds * rate)]
    if not len(samples_S):
        raise BrokenAudioError("no samples")
    if not np.isfinite(samples_S).all():
        raise BrokenAudioError("samples that are not numbers")
    peak = float(np.abs(samples_S).max())
    if peak > MAX_SAMPLE:
        raise BrokenAudioError(f"samples up to {peak:.3g}, where full scale is 1")
    if rate != sample_rate:
        from scipy.signal import resample_poly  # imported here: it takes half a second, which every command would wait

        common = math.gcd(rate, sample_rate)
        samples_S = resample_poly(samples_S, sample_rate // common, rate // common)
    return np.asarray(samples_S, dtype=np.float32)


def _read(audio: bytes | Path, longest_s: float) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        if isinstance(audio, Path) and not audio.is_file():
            raise BrokenAudioError("no such file")
        with soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else os.fsencode(audio)) as file:
            limit = sys.maxsize if longest_s == math.inf else math.ceil(longest_s * file.samplerate)
            # A FLAC file that was streamed does not say how long it is, and the library cannot seek in it.
            read = _read_forward if file.frames == UNKNOWN_LENGTH else _read_known
            return read(file, limit), file.samplerate
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # soundfile's own errors are RuntimeErrors
        # The full message of the library contains the address of a buffer.
        raise BrokenAudioError(getattr(error, "error_string", "") or first_line(error)) from error


def _read_known(file: Any, limit: int) -> np.ndarray:
    return np.asarray(file.read(min(file.frames, limit), dtype="float32", always_2d=True))


def _read_forward(file: Any, limit: int) -> np.ndarray:
    """Read up to `limit` frames of a file of unknown length, in blocks."""
    file.seekable = lambda: False  # `read` would seek to where it is
    blocks, num_read = [], 0
    while num_read < limit:
        block_SC = file.read(min(BLOCK, limit - num_read), dtype="float32", always_2d=True)
        blocks.append(block_SC)
        num_read += len(block_SC)
        if not len(block_SC):
            break
    return np.concatenate(blocks)


def log_mel(samples_S: np.ndarray, sample_rate: int, num_mels: int) -> Tensor:
    """Return the log-mel spectrogram [frames, M], fp32: 25 ms windows every 10 ms, natural logarithm of the energy.

    Frame n is centred on the samples n·hop to (n+1)·hop, so S samples give ceil(S / hop) frames.
    """
    window, hop = round(WINDOW_S * sample_rate), round(HOP_S * sample_rate)
    num_bins = _num_bins(sample_rate)
    num_frames = -(-len(samples_S) // hop)
    padded = functional.pad(torch.from_numpy(samples_S), ((num_bins - hop) // 2, num_bins))
    spectrum_FN = torch.stft(
        padded, num_bins, hop, window, torch.hann_window(window), center=False, return_complex=True
    )
    energy_NF = spectrum_FN[:, :num_frames].abs().square().T
    return (energy_NF @ mel_filters(sample_rate, num_bins, num_mels) + FLOOR).log()


def max_num_mels(sample_rate: int) -> int:
    """Return the largest number of mel bands, at most 80, for which each band has a frequency of the spectrum."""
    bins = _num_bins(sample_rate)
    return next(number for number in range(80, 0, -1) if (mel_filters(sample_rate, bins, number).sum(0) > 0).all())


def _num_bins(sample_rate: int) -> int:
    return 1 << (round(WINDOW_S * sample_rate) - 1).bit_length()


def normalise_bands(mel_NM: Tensor) -> Tensor:
    """Return the frames with mean 0 and variance 1 per band, which removes loudness and channel of a clip."""
    mean_M, std_M = mel_NM.mean(0), mel_NM.std(0, unbiased=False)
    return (mel_NM - mean_M) / (std_M + 1e-3)


@lru_cache(maxsize=8)
def mel_filters(sample_rate: int, num_bins: int, num_mels: int) -> Tensor:
    """Return triangular filters [num_bins / 2 + 1, M]: their peaks are evenly spaced on the mel scale.

    mel(f) = 2595 log10(1 + f / 700 Hz) (O'Shaughnessy 1987), from 20 Hz to half the sample rate; each peak is 1.
    """
    lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (20.0, sample_rate / 2))
    edge_hz = 700 * (10 ** (torch.linspace(lowest, highest, num_mels + 2, dtype=torch.float64) / 2595) - 1)
    bin_hz = torch.linspace(0, sample_rate / 2, num_bins // 2 + 1, dtype=torch.float64)
    rising = (bin_hz[:, None] - edge_hz[:-2]) / (edge_hz[1:-1] - edge_hz[:-2])
    falling = (edge_hz[2:] - bin_hz[:, None]) / (edge_hz[2:] - edge_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()
