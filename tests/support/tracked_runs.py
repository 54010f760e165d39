"""Run folders as a runner leaves them, for tests of tracking."""

import json
import math
import time
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from support.run_folders import write_result

from moebench.runs.journal import Journal

STEPS = 30
DIGEST = "9f" * 32


def build_experiment(results: Path, name: str = "quickstart") -> list[Path]:
    """Write a finished experiment of two arms and two seeds, as the runner does; return its run folders."""
    grid = [(arm, seed) for arm in ("switch", "dense") for seed in (0, 1)]
    cells = [{"id": f"{index:012x}", "arm": arm, "seed": seed} for index, (arm, seed) in enumerate(grid, 1)]
    record = {"name": name, "question": "Does switch beat dense?", "file": f"{name}.yaml"}
    (results / "experiments" / name).mkdir(parents=True)
    path = results / "experiments" / f"{name}.json"
    path.write_text(json.dumps({**record, "baseline": "dense", "cells": cells, "time": time.time()}))
    draw_figure(results / "experiments" / name / "curves.png")
    folders = [build_cell(results, name, cell) for cell in cells]
    for folder in folders:
        write_steps(folder, 1, STEPS)
        write_final_files(folder)
    return folders


def build_cell(results: Path, experiment: str, cell: Mapping[str, Any]) -> Path:
    """Write the folder of a cell that has not started."""
    folder = results / "runs" / str(cell["id"])
    folder.mkdir(parents=True)
    config = {"router": {"name": cell["arm"]}, "training": {"steps": STEPS}}
    content = {**cell, "config": config, "data": {"name": "shakespeare", "digest": DIGEST}}
    varies = {"router.name": cell["arm"], "seed": str(cell["seed"])}
    (folder / "cell.json").write_text(json.dumps({**content, "varies": varies, "experiment": experiment}))
    environment = {"python": "3.11", "git_commit": "abc123", "git_dirty": False}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_steps(folder: Path, first: int, last: int) -> None:
    """Write the journal and the loads of some steps."""
    with Journal(folder / "journal.jsonl") as journal:
        for step in range(first, last + 1):
            journal.append(step, {"loss/task": 3 / step + 1, "train/learning_rate": 1e-3}, time=1e9 + step)
            if step % 10 == 0:
                journal.append(step, {"eval/bits_per_byte": 2.0 + 1 / step}, time=1e9 + step)
                layers = {"encoder.1": [step, 2, 3, 4], "decoder.0": [1, 1, 1, 1]}
                with (folder / "load.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "layers": layers}) + "\n")


def write_checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"step_{step}.json").write_text("{}")


def write_final_files(folder: Path, status: str = "done", error: str | None = None) -> None:
    draw_figure(folder / "load.png")
    (folder / "log.txt").write_text("step 30\n")
    final = {"bits_per_byte": 2.03, "load/dead_experts": math.nan} if status == "done" else {}
    costs = {"cost": {"active_params": 1e6}, "throughput": {"tokens_per_s": 1e4}}
    write_result(folder, status=status, error=error, step=STEPS, metrics=final, **costs)


def draw_figure(path: Path) -> None:
    path.write_bytes(_draw_load())


@cache
def _draw_load() -> bytes:
    """Return a figure as PNG, drawn once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 3))
    axes.bar(["expert 0", "expert 1", "expert 2"], [5, 2, 3])
    axes.set_title("Load of layer 1")
    content = BytesIO()
    figure.savefig(content, format="png")
    pyplot.close(figure)
    return content.getvalue()
