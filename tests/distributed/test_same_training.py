"""The same batch gives the same losses, gradients, norms and updates on one process and on any mesh of them."""

import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mesh_cases import SHORT, fits, matrix
from support.process_group import ALONE, SHAPES, Mesh, Shape
from support.training_cases import write_text
from support.training_steps import assert_same_training, train_steps, trained_alike

from moebench.errors import UsageError
from moebench.registry import load_plugin
from moebench.routing.router import ROUTERS

PLUGINS = [Path(__file__).parents[1] / "support" / name for name in ("collapsed_router.py", "padded_task.py")]
TOLERANCES = {
    # 8 bits: another split of a sum rounds differently, and a near tie is then routed differently.
    "bf16": {"tolerance": 3e-2},
    # It learns from differences of losses that are nearly alike: what rounds in the loss weighs more in them.
    "router ponder_net": {"tolerance": 1e-4},
}


def train_all(mesh: Mesh, text: Path, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train one case after the other in the same processes: starting them costs more than training."""
    if "collapsed" not in ROUTERS.names():
        for plugin in PLUGINS:
            load_plugin(str(plugin))
    found: dict[str, Any] = {}
    for name, overrides in cases.items():
        own = folder / name.replace(" ", "_")
        own.mkdir(exist_ok=True)
        try:
            found[name] = train_steps(mesh, text, overrides, own)
        except UsageError as error:  # before anything is built, and on every rank
            found[name] = str(error)
        except Exception:
            found[name] = traceback.format_exc()
            if mesh.size > 1:
                break  # the others may wait where nobody comes: what follows could not be believed
    return found


@pytest.fixture(scope="module")
def results(
    built_once: Callable[[str, Callable[[Path], Any]], Path], request: pytest.FixtureRequest
) -> Callable[[Shape], Any]:
    """Return a function that trains all selected cases on a mesh, once in a test run."""
    wanted = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}

    @cache
    def train(key: tuple[int, int]) -> list[dict[str, Any]]:
        shape = Shape(*key)
        cases = {name: shape.over(overrides) for name, overrides in matrix().items() if name in wanted}
        cases = {name: overrides for name, overrides in cases.items() if fits(name, shape)}

        def build(folder: Path) -> None:
            torch.save(shape.run(train_all, write_text(folder), cases, folder), folder / "results.pt")

        return torch.load(built_once(f"same_training_{shape}", build) / "results.pt", weights_only=False)

    return lambda shape: train((shape.data, shape.expert))


def the_case(results: Callable[[Shape], Any], shape: Shape, name: str) -> dict[str, Any]:
    """Return what a case found on a mesh, the same on all ranks."""
    found = [of_rank.get(name, "a case before it failed") for of_rank in results(shape)]
    errors = [value for value in found if isinstance(value, str)]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
    return trained_alike(found)


CASES = [
    pytest.param(shape, name, id=f"{shape}-{name}", marks=() if name in SHORT else pytest.mark.slow)
    for shape in SHAPES
    for name in matrix()
    if fits(name, shape)
]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_same_training(results: Callable[[Shape], Any], shape: Shape, name: str) -> None:
    tolerance = TOLERANCES.get(name, {})
    assert_same_training(the_case(results, shape, name), the_case(results, ALONE, name), **tolerance)
