"""A cell so small that a test can train it, through the code of every run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moebench.config import component_keys, merge_settings, resolve
from moebench.parallel.checkpoint import REST
from moebench.parallel.mesh import Mesh
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.recorder import RunRecorder
from moebench.runs.result import RunResult
from moebench.schema import CellConfig
from moebench.tasks.language import Language, TextTask
from moebench.tasks.task import ALL, TASKS, Batch
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import select_device, train_cell

TINY: dict[str, Any] = {
    "task": {"sequence_length": 8, "eval_windows": 2},
    "model": {"d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_width": 16},
    "layout": {"n": 1, "num_experts": 4, "expert_width": 8},
    "train": {
        "steps": 12,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 5,
        "checkpoint_every": 100,
        "device": "cpu",
    },
}

UNREPEATABLE = ("train/tokens_per_s", "train/mfu", "time/data_share", "time/train_s", "system/")
"""Metrics that depend on time."""


def write_text(folder: Path) -> Path:
    """Write two domains of ten short documents."""
    rows = [{"text": f"{name} {i} " * 20, "domain": name} for i in range(10) for name in ("ab", "xyz")]
    file = folder / "text.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def tiny_config(text: Path, **overrides: Any) -> CellConfig:
    """Return the configuration of a tiny cell, with the sections given as keywords merged in."""
    raw = merge_settings(TINY, overrides)
    task = raw["task"]
    if "data" in component_keys("task", task.get("name", "language")):
        is_text = issubclass(TASKS.get(task.get("name", "language")).item, TextTask)
        data = {"path": str(text), **({"tokenizer": "bytes"} if is_text else {})}
        raw = merge_settings(raw, {"task": {"data": data | task.get("data", {})}})
    return resolve(raw)


@dataclass
class Run:
    """The training of a cell in a folder; call it again to resume."""

    config: CellConfig
    folder: Path
    task: Any = None
    progress: Callable[[dict[str, Any]], None] = lambda message: None
    step: int = 0
    results: Path = Path("results")
    """Results folder with the parents of the cell."""
    cell_id: str = "0" * 12

    def __call__(self, stop_at: int | None = None) -> RunResult | None:
        """Train to the end, or until after step `stop_at`."""
        task = self.task or prepare_task(self.config, self.folder)
        with RunRecorder(RunFolder(self.folder)) as recorder:
            context = RunContext(
                recorder=recorder,
                checkpoints=self.checkpoints,
                results=self.results,
                report_progress=self._follow,
                should_stop=lambda: self.step == stop_at,
            )
            mesh = Mesh(device=select_device(self.config.train))
            return train_cell(self.config, task, context, cell_id=self.cell_id, arm="arm", mesh=mesh)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def loads(self) -> list[tuple[int, dict[str, list[int]]]]:
        file = self.folder / "load.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        return [(line["step"], line["layers"]) for line in lines]

    def _follow(self, message: dict[str, Any]) -> None:
        self.step = message["step"] + 1  # `should_stop` is called before the progress of a step is reported
        self.progress(message)

    def points(self) -> list[tuple[int, dict[str, float]]]:
        """Return the points of the journal without the metrics that depend on time."""
        points, _ = read_journal(self.folder / "journal.jsonl")
        return [
            (point.step, {name: value for name, value in point.metrics.items() if not name.startswith(UNREPEATABLE)})
            for point in points
        ]

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Read the checkpoint of a step."""
        return read_checkpoint(self.checkpoints / f"step_{step:07d}.ckpt")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, with full tensors."""
    merged = folder.parent / f"{folder.name}.whole"
    dcp_to_torch_save(folder, merged)
    content: dict[str, Any] = torch.load(merged, map_location="cpu", weights_only=False)
    merged.unlink()
    return content | torch.load(folder / REST, map_location="cpu", weights_only=True)


class Watched(Language):
    """The language task; records its batches, and passes the training loss of some of them to `spoil`."""

    def __init__(self, task: Language, spoil: Callable[[torch.Tensor], torch.Tensor] | None = None, at: int = 4):
        """`at`: number of the batch to spoil, from 1; however often a step with it is made."""
        super().__init__(task.config, task.text)
        self.seen: list[torch.Tensor] = []
        self.numbers: list[int] = []
        """Numbers of the batches made, from 0."""
        self.spoil = spoil
        self.at = at

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        batch = super().train_batch(batch_size, seed, step, part)
        self.seen.append(batch.input_BL)
        self.numbers.append(step)
        return batch

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        loss_BP = super().loss(output, batch)
        if output.requires_grad and self.spoil is not None and self.is_spoiled(self.find_number(batch)):
            return self.spoil(loss_BP)
        return loss_BP

    def is_spoiled(self, number: int) -> bool:
        """Return whether the batch will be spoiled."""
        return number == self.at - 1

    def find_number(self, batch: Batch) -> int:
        """Return the number of a batch; the trainer makes one before it needs it."""
        pairs = zip(self.numbers[-2:], self.seen[-2:], strict=True)
        return next(number for number, input_BL in pairs if torch.equal(input_BL, batch.input_BL))


def assert_same_tree(ours: Any, theirs: Any, path: str = "") -> None:
    """Compare nested mappings and lists bit for bit."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same_tree(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, Sequence) and not isinstance(ours, str):
        assert len(ours) == len(theirs), path
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_tree(left, right, f"{path}[{index}]")
    else:
        assert ours == theirs, path


def assert_same_runs(complete: Run, parts: Run) -> None:
    """Compare two trainings of one cell: last checkpoint and journal, bit for bit."""
    last = complete.config.train.steps
    ours, theirs = complete.checkpoint(last), parts.checkpoint(last)
    for key in ("state_dict", "optimizer", "lr_schedulers", "global_step"):
        assert_same_tree(ours[key], theirs[key], key)
    spikes = [content["callbacks"]["CellCallback"]["spikes"] for content in (ours, theirs)]
    assert_same_tree(*spikes, "spikes")
    assert complete.points() == parts.points()
