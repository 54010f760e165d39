"""A resumed run is bit-identical to an uninterrupted one; arms with the same seed see the same data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.task_data import write_data
from support.training_cases import Run, Watched, assert_same_runs, tiny_config, write_text

from moebench.registry import load_plugin
from moebench.routing.router import ROUTERS
from moebench.tasks.task import TASKS
from moebench.training.model import build_initialised_model, prepare_task

ROUTERS_WITH_AND_WITHOUT_DRAWS = [
    "noisy_top_k",
    "quantile_balancing",
    {"name": "stable_moe", "stage_1_steps": 0},  # its student never has a gradient
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("switch", "random")),
]

COUNTING = '''
from dataclasses import dataclass

import torch

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(
    Facts(
        family="token choice", equation="y = x", paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="as switch", batch_dependent=False),
    )
)
class Counting(Switch):
    """Counts the assignments of each expert over all steps in a buffer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options."""

        name: str = "counting"

    def __init__(self, config, context):
        super().__init__(config, context)
        self.register_buffer("total_E", torch.zeros(context.num_experts, dtype=torch.int64))

    def after_step(self, load_E, sums):
        self.total_E += load_E
'''


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("router", ROUTERS_WITH_AND_WITHOUT_DRAWS, ids=str)
def test_resumed_run_equals_an_uninterrupted_one(text: Path, tmp_path: Path, router: Any) -> None:
    config = tiny_config(text, router=router)
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    result = full()
    assert parts(stop_at=5) is None
    assert parts.checkpoint(5)["global_step"] == 5
    resumed = parts()
    assert result is not None
    assert resumed is not None
    assert resumed.metrics == result.metrics
    assert resumed.step == result.step == 12
    assert_same_runs(full, parts)


SIMILAR_TASKS = ("masked_language", "keyword", "clustered", "language", "speech")
"""Tasks whose batches are made like those of others, or from the seed alone; that of speech is in
`test_other_inputs_resume_with_dropout_too`, that of language with micro-batches in `test_muon_resumes_exactly`."""


@pytest.mark.parametrize(
    "task",
    [pytest.param(name, marks=pytest.mark.slow) if name in SIMILAR_TASKS else name for name in TASKS.names()],
)
def test_every_task_resumes_exactly(
    task: str, data: Mapping[str, Mapping[str, Any]], text: Path, tmp_path: Path
) -> None:
    # 12 steps of 8 are more than an epoch of some tasks; a step has two micro-batches.
    train = {"batch_size": 8, "accumulate": 2, "checkpoint_every": 5}
    options = {"name": task, **data[task]} | ({"mirror": ["all"]} if task == "vision" else {})
    config = tiny_config(text, router="noisy_top_k", task=options, train=train, allow_noncausal=True)
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    assert full() is not None
    assert parts(stop_at=7) is None
    assert parts() is not None
    assert_same_runs(full, parts)
    losses = [metrics["loss/task"] for _, metrics in full.points() if "loss/task" in metrics]
    assert len(set(losses)) == 12


def test_points_after_the_checkpoint_are_replaced(text: Path, tmp_path: Path) -> None:
    # A process killed at step 8 leaves points that are later than its checkpoint of step 4.
    class KilledError(Exception):
        pass

    def kill(message) -> None:
        if message["step"] == 8:
            raise KilledError

    config = tiny_config(text, train={"checkpoint_every": 4, "eval_every": 3})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts", progress=kill)
    full()
    with pytest.raises(KilledError):
        parts()
    (parts.checkpoints / "step_0000008.json").unlink()  # killed before its manifest was written
    parts.progress = lambda message: None
    parts()
    assert_same_runs(full, parts)


def test_router_state_is_restored_exactly(text: Path, tmp_path: Path, plugin) -> None:
    load_plugin(plugin.write(COUNTING, name="counting.py"))
    assert "counting" in ROUTERS.names()
    config = tiny_config(text, router="counting")
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    full()
    parts(stop_at=5)
    # 5 steps of 4 sequences of 8 tokens, each with one expert, in each of the two layers
    state = parts.checkpoint(5)["state_dict"]
    totals = [int(value.sum()) for name, value in state.items() if name.endswith("total_E")]
    assert totals == [5 * 4 * 8] * 2
    parts()
    assert_same_runs(full, parts)


def test_cell_trained_twice_is_bit_identical(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="gshard")
    runs = [Run(config, tmp_path / name) for name in ("one", "two")]
    for run in runs:
        torch.manual_seed(hash(run.folder.name) % 1000)  # earlier use of torch's generator does not matter
        run()
    assert_same_runs(*runs)


def test_arms_with_the_same_seed_see_the_same_data(text: Path, tmp_path: Path) -> None:
    inputs = {}
    for arm, seed in [("dense", 0), ("switch", 0), ("noisy_top_k", 0), ("switch", 1)]:
        config = tiny_config(text, router=arm, seed=seed)
        task = Watched(prepare_task(config, tmp_path))
        Run(config, tmp_path / f"{arm}{seed}", task=task)()
        inputs[arm, seed] = torch.stack(task.seen[:12])
    assert torch.equal(inputs["dense", 0], inputs["switch", 0])
    assert torch.equal(inputs["dense", 0], inputs["noisy_top_k", 0])
    assert not torch.equal(inputs["switch", 0], inputs["switch", 1])


def test_arms_with_the_same_seed_have_the_same_initial_weights(text: Path, tmp_path: Path) -> None:
    def weights(router: str, seed: int) -> dict[str, torch.Tensor]:
        config = tiny_config(text, router=router, seed=seed)
        return build_initialised_model(config, prepare_task(config, tmp_path)).state_dict()

    switch, top_k, dense = (weights(router, 0) for router in ("switch", "top_k", "dense"))
    other_seed = weights("switch", 1)
    assert switch.keys() == top_k.keys()
    assert all(torch.equal(switch[name], top_k[name]) for name in switch)
    shared = [name for name in dense if "feed_forward." not in name]
    assert len(shared) == 2 + 2 * 4 + 1  # embedding, head; per block two norms, qkv and out; final norm
    assert all(torch.equal(dense[name], switch[name]) for name in shared)
    for name in ("embedding.weight", "backbone.blocks.0.attention.qkv.weight"):
        assert not torch.equal(switch[name], other_seed[name])
    assert not torch.equal(
        switch["backbone.blocks.0.attention.qkv.weight"], switch["backbone.blocks.1.attention.qkv.weight"]
    )
