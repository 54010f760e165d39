"""The parts of a step: what is computed again in the backward pass belongs to that."""

from pathlib import Path

import pytest
import torch
from support.training_cases import tiny_config, write_text
from typing_extensions import override

from moebench.bench.step.parts import Stopwatch
from moebench.bench.step.runs import PlainLoop, build_module
from moebench.training.model import prepare_task


class CountingStopwatch(Stopwatch):
    """Its time is the number of readings."""

    count = 0

    @override
    def now(self) -> float:
        self.count += 1
        return float(self.count)


@pytest.mark.parametrize("router", ["dense", "top_k"])
def test_recomputed_blocks_count_as_backward(router: str, tmp_path: Path) -> None:
    text, measured = write_text(tmp_path), {}
    for choice in ("none", "blocks"):
        config = tiny_config(text, router=router, train={"recompute": choice, "steps": 100})
        module = build_module(config, prepare_task(config, tmp_path), torch.device("cpu"))
        watch = CountingStopwatch(torch.device("cpu"))
        PlainLoop(module=module).time_block(2, watch)
        measured[choice] = watch.average_parts(2)
    assert measured["blocks"].pop("backward") > measured["none"].pop("backward") == 1
    assert measured["blocks"] == measured["none"]
