"""Models of cells with random weights, none of them at its initial zero, and their logits."""

from pathlib import Path
from typing import Any

import torch
from support.run_folders import write_cell
from support.training_cases import tiny_config
from torch import Tensor, nn

from moebench.analysis.exported_run import ExportedRun, ExportOptions, write_model
from moebench.analysis.trained_run import TrainedRun
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_model, prepare_task


def draw_weights(module: nn.Module, seed: int = 0) -> None:
    """Draw all weights and buffers so that logits are of the order of 1, and nothing has its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        is_gain = "norm" in name and name.endswith("weight")
        is_matrix = value.dim() > 1
        value.copy_(
            1 + 0.3 * noise if is_gain else noise * max(value.shape[-1], 1) ** -0.5 if is_matrix else 0.2 * noise
        )


def compute_logits(model: Model, token_BL: Tensor) -> Tensor:
    """Return the logits of a language model in evaluation mode, in fp32."""
    zeros_B = torch.zeros(len(token_BL), dtype=torch.int64)
    batch = Batch(input_BL=token_BL, target_BP=token_BL, weight_BP=torch.ones_like(token_BL), domain_B=zeros_B)
    with torch.no_grad():
        logits, _ = model(batch, batch_context(batch, training=False, seed=0))
    assert isinstance(logits, Tensor)
    return logits


def draw_tokens(vocab_size: int, length: int = 24) -> Tensor:
    """Return three sequences of random ids."""
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


class RandomRun:
    """A run that was never trained: its cell, its task and random weights."""

    def __init__(self, root: Path, text: Path, **sections: Any) -> None:
        """`root`: a results folder. `text`: as `support.training_cases.write_text` writes it."""
        self.results = root
        self.config: CellConfig = tiny_config(text, **sections)
        self.task: Task = prepare_task(self.config, root)
        self.model = build_model(self.config, self.task).eval()
        draw_weights(self.model)

    def export(self, out: Path, **options: Any) -> ExportedRun:
        """Write the model to a folder, as `moebench export` does."""
        folder = RunFolder.of(self.results, "random")
        write_cell(folder.path)
        run = TrainedRun(folder=folder, cell=folder.read_cell(), config=self.config, task=self.task)
        chosen = ExportOptions(out=out, **options)
        chosen.check()
        return write_model(run, self.model.state_dict(), self.config.train.steps, chosen, self.results)
