"""Measured FLOPs per token are held at a target: in training, in evaluation, and by a resumed run."""

from pathlib import Path
from typing import Any

import pytest
from support.training_cases import Run, assert_same_runs, tiny_config, write_text

from moebench.schema import CellConfig
from moebench.training.budget import MAX_EVALUATIONS, Budget, build_budget
from moebench.training.model import build_model, prepare_task

SIZES = {"model": {"d_model": 16, "ffn_width": 96}, "task": {"sequence_length": 16, "eval_windows": 64}}
TRAIN = {"steps": 100, "batch_size": 16, "eval_every": 100, "log_every": 50, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def configure(text: Path, router: Any, match: str = "measured_flops", **train: Any) -> CellConfig:
    layout = {"match": match, "expert_width": None, "num_experts": 4}
    return tiny_config(text, router=router, layout=layout, train=TRAIN | train, allow_noncausal=True, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["dynmoe", "mixture_of_depths"])
def test_the_mean_lands_on_the_target(text: Path, tmp_path: Path, router: str) -> None:
    free = Run(configure(text, router, match="flops"), tmp_path / "free")()
    held = Run(configure(text, router), tmp_path / "held")()
    assert free is not None
    assert held is not None
    target = held.cost["target_flops_per_token"]
    for name in ("train_flops_per_token", "train_last_flops_per_token"):
        assert held.cost[name] == pytest.approx(target, rel=0.02), name
    # Evaluation is adjusted on the validation split; the test split of this text is two documents.
    assert held.validation["load/flops_per_token"] == pytest.approx(target, rel=0.02)
    assert held.metrics["load/flops_per_token"] == held.cost["eval_flops_per_token"]
    assert "target_flops_per_token" not in free.cost
    assert abs(free.validation["load/flops_per_token"] / target - 1) > 0.02


def test_a_resumed_run_is_adjusted_alike(text: Path, tmp_path: Path) -> None:
    config = configure(text, "dynmoe", steps=20, eval_every=8)
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    result = full()
    assert parts(stop_at=7) is None
    assert parts.checkpoint(7)["state_dict"]["model.backbone.blocks.0.feed_forward.router.threshold_shift"] != 0
    resumed = parts()
    assert result is not None
    assert resumed is not None
    assert resumed.cost == result.cost
    assert_same_runs(full, parts)


def test_without_a_target_nothing_is_adjustable(text: Path, tmp_path: Path) -> None:
    config = configure(text, "top_p", match="flops")
    task = prepare_task(config, tmp_path)
    model = build_model(config, task)
    assert build_budget(config, model, task) is None
    assert not [name for name in model.state_dict() if name.endswith(".top_p")]


def build(text: Path, tmp_path: Path) -> Budget:
    config = configure(text, "top_p")
    task = prepare_task(config, tmp_path)
    budget = build_budget(config, build_model(config, task), task)
    assert budget is not None
    return budget


def test_the_search_stops_at_the_target_and_at_the_bounds(text: Path, tmp_path: Path) -> None:
    budget = build(text, tmp_path)
    budget.freeze(lambda: budget.target * (1 + 0.3 * (budget.setting - 0.7)))
    assert budget.final_setting == pytest.approx(0.7, abs=0.01)
    evaluations = []

    def never() -> float:
        evaluations.append(budget.setting)
        return 0.5 * budget.target

    budget.freeze(never)
    assert len(evaluations) <= MAX_EVALUATIONS
    (value,) = {float(controlled.router.top_p) for controlled in budget.routers}
    assert 0 < value <= 1
