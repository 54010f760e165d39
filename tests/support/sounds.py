"""Sounds that tests make: tones, and files of them."""

import io

import numpy as np
import soundfile


def tone(hz: float, seconds: float = 0.5, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def encode_wav(samples: np.ndarray, rate: int = 8000, **options: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | options))
    return file.getvalue()
