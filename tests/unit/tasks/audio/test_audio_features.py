import math

import numpy as np
import pytest
import torch

from moebench.tasks.audio.features import log_mel, mel_filters, normalise_bands


def mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def sine(hz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_sine_has_its_peak_in_the_band_around_its_frequency(rate, hz):
    num_mels = 40
    band = int(log_mel(sine(hz, rate), rate, num_mels).mean(0).argmax())
    lowest, highest = mel(20), mel(rate / 2)
    # Band b has its peak b + 1 steps of (highest - lowest) / 41 above the lowest edge.
    expected = (mel(hz) - lowest) / ((highest - lowest) / (num_mels + 1)) - 1
    assert abs(band - expected) <= 1


def test_frames_are_10_ms_apart_and_begin_with_the_sound():
    samples = np.concatenate([np.zeros(800, dtype=np.float32), sine(1000, 8000, 0.1)])
    frames_NM = log_mel(samples, 8000, 40)
    assert frames_NM.shape == (20, 40)  # 1,600 samples, 80 a frame
    loudness_N = frames_NM.amax(1)
    # Silence is ln 1e-6; the window of frame 8 (samples 580 ... 780) ends before the sound, that of frame 12 is in it.
    assert loudness_N[:8] == pytest.approx(math.log(1e-6), abs=1e-3)
    assert (loudness_N[12:18] > 0).all()
    assert len(log_mel(samples[:81], 8000, 40)) == 2
    assert len(log_mel(samples[:1], 8000, 40)) == 1


def test_filters_are_triangles_that_reach_from_peak_to_peak():
    filters_FM = mel_filters(8000, 4096, 20).double()
    assert filters_FM.max() <= 1
    assert (filters_FM.amax(0) > 0.9).all()
    # Between the first and the last peak, two neighbours add up to 1.
    first, last = filters_FM[:, 0].argmax(), filters_FM[:, -1].argmax()
    assert filters_FM[first + 1 : last].sum(1) == pytest.approx(1.0, abs=1e-6)


def test_normalised_features_do_not_depend_on_loudness():
    samples = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    frames_NM = normalise_bands(log_mel(samples, 8000, 40))
    assert frames_NM.mean(0).abs().max() < 1e-5
    assert torch.allclose(frames_NM.std(0, unbiased=False), torch.ones(40), atol=5e-3)
    assert torch.allclose(frames_NM, normalise_bands(log_mel(3 * samples, 8000, 40)), atol=1e-3)
    assert normalise_bands(torch.ones(1, 40)).abs().max() == 0  # a single frame
