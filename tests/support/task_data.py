"""Data so small that every task can train on it: text, pictures and tones, written by the tests."""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from support.training_cases import write_text

HZ = {"a": 400, "b": 900, "c": 1800}
WORDS = [x + y + z for x in "abc" for y in "abc" for z in "abc"]


def write_words(folder: Path) -> Path:
    """Write words as recordings: each letter is a tone of its own; the lengths differ."""
    for number, word in enumerate(WORDS):
        second = np.arange(800 + 160 * (number % 7)) / 8000
        samples = np.concatenate([np.sin(2 * np.pi * HZ[letter] * second) for letter in word])
        file = folder / word[0] / f"{word}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, 0.3 * samples, 8000)
        file.with_suffix(".txt").write_text(word)
    return folder


def write_pictures(folder: Path) -> Path:
    """Write four classes of 20 pictures of 8 x 8: noise around a grey of their own."""
    draw = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir()
        for index in range(20):
            grey = np.clip(60 * label + draw.integers(0, 60, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(folder / f"class{label}" / f"{index}.png")
    return folder


def write_data(root: Path) -> dict[str, dict[str, object]]:
    """Write all data; return the options of each task that reads it."""
    for name in ("text", "pictures", "words"):
        (root / name).mkdir()
    text = {
        "sequence_length": 16,
        "eval_windows": 2,
        "data": {"path": str(write_text(root / "text")), "tokenizer": "bytes"},
    }
    words = {"data": {"path": str(write_words(root / "words"))}}
    return {
        "language": text,
        "masked_language": text,
        "span_corruption": text,
        "vision": {"patch": 4, "data": {"path": str(write_pictures(root / "pictures")), "size": 8}},
        "speech": words,
        "keyword": words,
        "clustered": {"sequence_length": 16},
    }
