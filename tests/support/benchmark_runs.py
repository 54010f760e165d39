"""Cells of next-token prediction with random weights, for tests of what a benchmark asks of a model."""

import random
from pathlib import Path
from typing import Any

import torch

from moebench.analysis.benchmarks.run_model import RunModel
from moebench.config import resolve
from moebench.tasks.language import Language
from moebench.training.model import build_initialised_model, prepare_task

TEXT = "the mill stood by a river and its miller counted sacks of flour each day until winter came"
WORDS = TEXT.split()


def write_documents(folder: Path, num_words: int = 300) -> None:
    """Write two domains of six documents each."""
    rng = random.Random(1)
    for number in range(12):
        file = folder / "ab"[number % 2] / f"document{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choices(WORDS, k=num_words)))


def build_run_model(folder: Path, **sections: Any) -> RunModel:
    """Return a small model with random weights whose data are in a folder; `sections`: parts of the configuration."""
    if not (folder / "text").exists():
        write_documents(folder / "text")
    base: dict[str, Any] = {
        "task": {
            "name": "language",
            "sequence_length": 24,
            "data": {"path": str(folder / "text"), "tokenizer": "bytes"},
        },
        "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 32},
        "layout": {"name": "every_n", "n": 1, "num_experts": 4, "match": "none", "expert_width": 8},
        "train": {"device": "cpu"},
    }
    for name, section in sections.items():
        merged = {**base.get(name, {}), **section}
        base[name] = {key: value for key, value in merged.items() if value is not None}  # None: without the key
    config = resolve(base)
    task = prepare_task(config, folder / "results")
    assert isinstance(task, Language)
    model = build_initialised_model(config, task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # logits that differ: the head begins at zero
        for parameter in model.head.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return RunModel(config, task, model)
