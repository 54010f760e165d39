"""Many steps with routers that rank: the same losses and parameters on one process and on every mesh.

Some bytes of a text have nearly equal vectors, and an auction compares nearly equal values. If the last bits of a sum
decided, a mesh would diverge from one process within 10 to 40 steps in this setting.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mesh_cases import TRAIN
from support.process_group import ALONE, SHAPES, Mesh, Shape
from support.training_steps import train_steps

LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 1e-4
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "switch": ("switch", {"capacity_factor_train": 1.0}),
    "loss_free": ("loss_free", {}),
    "top_k": ("top_k", {"capacity_factor_train": 0.9, "drop_order": "score"}),
    "expert_choice": ("expert_choice", {}),
    "base": ("base", {}),
}
FEW, MANY = 40, 100
"""Steps: enough for each of the last three arms to diverge, and the number in docs/parallel.md."""
CASES = [
    *(
        pytest.param(shape, arm, FEW, marks=pytest.mark.slow)
        for shape in SHAPES
        for arm in ("top_k", "expert_choice", "base")
    ),
    *(pytest.param(shape, arm, MANY, marks=pytest.mark.slow) for shape in SHAPES for arm in ARMS),
]


def config_of(arm: str, steps: int) -> dict[str, Any]:
    """Return the overrides of an arm: 512 bytes of the built-in text per step, 8 experts in each of 2 blocks."""
    router, layout = ARMS[arm]
    return {
        "task": {"sequence_length": 64, "eval_windows": 2, "data": {"path": None}},
        "model": {"d_model": 64, "num_layers": 2, "num_heads": 2, "ffn_width": 128},
        "layout": {"name": "every_n", "n": 1, "num_experts": 8, "expert_width": None, **layout},
        "router": {"name": router},
        "train": TRAIN | {"steps": steps, "log_every": 10},
        "allow_noncausal": True,
    }


def train_arms(mesh: Mesh, arms: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train the arms one after another; return the losses and the parameters of each."""
    results = {}
    for arm, overrides in arms.items():
        arm_folder = folder / f"{arm}_{overrides['train']['steps']}"
        arm_folder.mkdir(exist_ok=True)
        trained = train_steps(mesh, folder, overrides, arm_folder)
        results[arm] = {"losses": [step["loss"] for step in trained["steps"]], "state": trained["state"]}
    return results


@pytest.fixture(scope="module")
def results(
    built_once: Callable[[str, Callable[[Path], Any]], Path], request: pytest.FixtureRequest
) -> Callable[[Shape, int], Any]:
    """Return a function that trains the selected arms for some steps on a mesh, once in a test run."""
    requested = [item.callspec.params for item in request.session.items if item.module is request.module]

    @cache
    def train(data: int, expert: int, steps: int) -> dict[str, Any]:
        shape = Shape(data, expert)
        names = dict.fromkeys(params["arm"] for params in requested if params["steps"] == steps)
        arms = {arm: shape.over(config_of(arm, steps)) for arm in names}

        def build(folder: Path) -> None:
            torch.save(shape.run(train_arms, arms, folder)[0], folder / "results.pt")

        return torch.load(built_once(f"mesh_ties_{shape}_{steps}", build) / "results.pt", weights_only=False)

    return lambda shape, steps: train(shape.data, shape.expert, steps)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Return the largest difference between the losses of a step, and between the final parameters."""
    losses = zip(ours["losses"], theirs["losses"], strict=True)
    states = ((ours["state"][name].double(), state.double()) for name, state in theirs["state"].items())
    return max(abs(our - their) for our, their in losses), max(float((our - s).abs().max()) for our, s in states)


@pytest.mark.parametrize(("shape", "arm", "steps"), CASES, ids=str)
def test_mesh_trains_as_one_process_does(
    results: Callable[[Shape, int], Any], shape: Shape, arm: str, steps: int
) -> None:
    loss, parameter = differences(results(shape, steps)[arm], results(ALONE, steps)[arm])
    print(f"{shape} {arm} {steps} steps: losses {loss:.1e}, parameters {parameter:.1e}")  # pytest -rP shows it
    assert loss <= LOSS_TOLERANCE
    assert parameter <= PARAMETER_TOLERANCE
