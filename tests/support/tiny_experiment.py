"""An experiment that trains in seconds, and the text it trains on."""

import random
from pathlib import Path
from typing import Any

ARMS = ("dense", "switch", "top_k")


def tiny(**changes: Any) -> dict[str, Any]:
    """Return an experiment of 3 arms and 2 seeds that trains in seconds; `changes` replace sections or `train` keys."""
    train = {"steps": 12, "batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 4, "eval_every": 6, "log_every": 1}
    train |= {"checkpoint_every": 4, "device": "cpu", "max_epochs": 1e9} | changes.pop("train", {})
    base = {
        "task": {
            "name": "language",
            "sequence_length": 32,
            "eval_windows": 4,
            "data": {"path": "text", "tokenizer": "bytes"},
        },
        "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 128},
        "layout": {"name": "every_n", "n": 2, "num_experts": 4},
        "train": train,
    }
    base |= changes.pop("base", {})
    grid = {"question": "Does it run?", "base": base, "grid": {"router": [*ARMS]}, "seeds": [0, 1]}
    return grid | {"baseline": "dense"} | changes


def write_text(folder: Path) -> None:
    """Write two domains of six documents each, the same on every call."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(200)]
    for number in range(12):
        file = folder / "ab"[number % 2] / f"document{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choices(vocabulary, k=500)))
