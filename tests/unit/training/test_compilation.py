"""`train.compile`: the same training by compiled blocks, without a break in the graph where a router draws nothing."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text
from torch._inductor import config as inductor

from moebench.errors import UsageError
from moebench.training import compilation

CELLS: dict[str, dict[str, Any]] = {
    "capacity": {"router": "loss_free", "layout": {"capacity_factor_train": 0.75}},
    "dense": {"router": "dense"},
    "whole batch": {"router": "expert_choice", "allow_noncausal": True},
    "holes": {"router": "remoe"},
    "recomputed": {"router": "top_k", "train": {"recompute": "blocks", "accumulate": 2}},
    "bf16": {"router": "top_k", "train": {"precision": "bf16"}},
    "draws": {"router": "noisy_top_k", "model": {"residual_dropout": 0.1}},
    "inductor": {"router": "top_k"},
}
QUICK, WITH_BREAKS = ("capacity",), ("draws",)


@pytest.fixture
def breaks() -> Iterator[Counter[str]]:
    """Reasons of the breaks in the graphs of a test."""
    options = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "capture_dynamic_output_shape_ops")
    with options.patch({name: getattr(options, name) for name in names}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


# The tables of rotations are cached, and the compiler traces what makes them.
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# It says what it cannot trace, and leaves it out.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
# It also looks for the gradients of the tensors that it meets.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CELLS]
)
def test_compiled_blocks_train_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Counter[str]
) -> None:
    text, ended = write_text(tmp_path), []
    if name != "inductor":
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # traces alike, and generates no code
    for is_compiled in (False, True):
        options = dict(CELLS[name])
        options["train"] = {"steps": 6, "eval_every": 3, **options.get("train", {}), "compile": is_compiled}
        run = Run(tiny_config(text, **options), tmp_path / str(is_compiled))
        assert run() is not None
        assert (sum(torch._dynamo.utils.counters["frames"].values()) > 0) == is_compiled
        ended.append(run)
    eager, compiled = ended
    assert bool(breaks) == (name in WITH_BREAKS), breaks
    weights = [run.checkpoint(6)["state_dict"] for run in ended]
    assert weights[0].keys() == weights[1].keys()
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, **tolerance)
    for (step, ours), (same_step, theirs) in zip(compiled.points(), eager.points(), strict=True):
        assert step == same_step
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)


def test_without_a_compiler_a_cpu_is_refused() -> None:
    message = r"train\.compile: true needs a C\+\+ compiler on a CPU, and none was found"
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(UsageError, match=message):
        compilation.compile_blocks(torch.nn.Linear(1, 1), torch.device("cpu"))
