"""Plug-in tasks that are unusual but keep the contract: the trial before training refuses none of them."""

from pathlib import Path
from typing import Any

import pytest
from support.broken_plugins import TASK
from support.training_cases import TINY

from moebench.config import merge_settings, resolve
from moebench.experiment.model_costs import ModelCosts
from moebench.registry import load_plugin

HEAD = "    def build_head"
EMBEDDING = "        return TokenEmbedding(16, d_model)"
OUTPUT = "        return TokenHead(d_model, 16, bias=False)"
SETS = "        return [self.draw(batch_size, split)]"
TARGETS = "target_BP=token_BM[:, :-1]"
LOSS = """        loss_T = functional.cross_entropy(output.flatten(0, 1), batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)
"""
UNUSUAL: dict[str, list[tuple[str, str]]] = {
    "frozen modules": [
        (EMBEDDING, f"{EMBEDDING}.requires_grad_(False)"),
        (OUTPUT, f"{OUTPUT}.requires_grad_(False)"),
    ],
    "targets that are missing": [
        (
            TARGETS,
            f"{TARGETS}.float().index_fill(1, torch.tensor([0]), torch.nan), count_BP=(ones_BL.cumsum(1) > 1).long()",
        ),
        (LOSS, "        return (output.mean(-1) - batch.target_BP.nan_to_num()).square()\n"),
    ],
    "a count of NumPy": [
        (HEAD, f"    def count_positions(self, size, seed, step):\n        return np.int64(8 * size)\n\n{HEAD}"),
        ("import torch\nfrom", "import numpy as np\nimport torch\nfrom"),
    ],
    "labels in evaluation alone": [
        (
            HEAD,
            "    def label_kinds(self):\n"
            f"        return [LabelKind(name='a', values=['b', 'c'], read=lambda b: b.label_BL)]\n\n{HEAD}",
        ),
        (
            SETS,
            "        whole = self.draw(batch_size, split)\n"
            "        return [dataclasses.replace(whole, label_BL=whole.input_BL % 2)]",
        ),
        ("import torch\nfrom", "import dataclasses\n\nimport torch\nfrom"),
    ],
    "a sequence of its own class": [
        (SETS, "        return Sets(lambda index: self.draw(batch_size, split, index))"),
        (
            "@TASKS.register",
            "class Sets:\n"
            "    def __init__(self, draw):\n        self.draw = draw\n\n"
            "    def __len__(self):\n        return 2\n\n"
            "    def __getitem__(self, index):\n        return self.draw(range(2)[index])\n\n\n@TASKS.register",
        ),
    ],
}
"""What is replaced in the plug-in, by what."""


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_the_trial_accepts(plugin: Any, tmp_path: Path, changes: list[tuple[str, str]]) -> None:
    text = f"{TASK}# {plugin.folder}\n"
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    load_plugin(plugin.write(text, name="my_task.py"))
    plain = {section: TINY[section] for section in ("model", "layout", "train")}
    config = resolve(merge_settings(plain, {"task": {"name": "broken"}, "model": {"tie_embeddings": False}}))
    assert ModelCosts(tmp_path).task(config).digest == "broken-1"
