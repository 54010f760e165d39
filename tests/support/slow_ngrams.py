"""Probabilities of n-grams by a slow count over dictionaries, and small tasks on text that have such baselines."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support.training_cases import tiny_config

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.language import TextTask
from moebench.training.model import prepare_task

Symbols = Sequence[int]


def write_domains(folder: Path) -> Path:
    """Write three domains of twelve documents of words drawn from a few, some with letters of two bytes."""
    draw = np.random.default_rng(0)
    words = ["the ", "then ", "tree ", "né ", "ann ", "\n"]
    rows = [
        {"text": "".join(draw.choice(words, 60)) + f"{name}{i}", "domain": name} for i in range(12) for name in "abc"
    ]
    file = folder / "text.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def make_task(text: Path, folder: Path, name: str, **options: Any) -> TextTask:
    """Return a prepared task of short windows on a file or folder of text."""
    data = {"tokenizer": "bytes", **options.pop("data", {})}
    config = tiny_config(text, task={"name": name, "sequence_length": 24, "eval_windows": 3, **options, "data": data})
    task = prepare_task(config, folder)
    assert isinstance(task, TextTask)
    return task


def count(texts: Sequence[Symbols], order: int) -> dict[tuple[int, ...], Counter[int]]:
    """Return the context of `order - 1` symbols -> counts of the next symbol."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for symbols in texts:
        for end in range(order - 1, len(symbols)):
            counts[tuple(symbols[end - order + 1 : end])][symbols[end]] += 1
    return counts


def predict(tables: Sequence[dict[tuple[int, ...], Counter[int]]], before: Symbols, symbol: int, size: int) -> float:
    """Return the interpolated probability of a symbol after the given ones; `tables`: orders 1, 2, ..."""
    p = 1 / size
    for order, table in enumerate(tables, 1):
        seen = table.get(tuple(before[len(before) - order + 1 :]) if order > 1 else ())
        if order - 1 <= len(before) and seen:
            p = (seen[symbol] + len(seen) * p) / (seen.total() + len(seen))
    return p


def by_name(baselines: Sequence[TrivialBaseline]) -> dict[str, TrivialBaseline]:
    """Return name -> baseline."""
    return {baseline.name: baseline for baseline in baselines}
