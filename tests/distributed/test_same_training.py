"""Losses, gradients, norms and updates are the same on one process and on any mesh."""

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
TOLERANCES: dict[str, dict[str, Any]] = {
    # 8 bits of precision: sums over another split round differently, which may route a near tie differently.
    "bf16": {"tolerance": 3e-2},
    # It learns from differences between nearly equal losses, which amplify rounding.
    "router ponder_net": {"tolerance": 1e-4},
    # Gradients of its second block are a thousandth of the head's, in fp32 sums of that size.
    "layout every_n": {"tolerance": 5e-5},
    # A stack runs on a rectangle as long as the longest sequence of its process, so two processes execute less.
    "layout whole_model": {"differing": ("load/flops_per_token",)},
    # Its gradients pass three attentions and their norms in each block.
    "model options, encoder-decoder": {"tolerance": 5e-5},
    "model options, whole models": {"differing": ("load/flops_per_token",)},
}


def train_all(mesh: Mesh, text: Path, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train the cases one after another in the same processes, which take longer to start than to train."""
    if "collapsed" not in ROUTERS.names():
        for plugin in PLUGINS:
            load_plugin(str(plugin))
    runs: dict[str, Any] = {}
    for name, overrides in cases.items():
        case_folder = folder / name.replace(" ", "_")
        case_folder.mkdir(exist_ok=True)
        try:
            runs[name] = train_steps(mesh, text, overrides, case_folder)
        except UsageError as error:  # before anything is built, and on every rank
            runs[name] = str(error)
        except Exception:
            runs[name] = traceback.format_exc()
            if mesh.size > 1:
                break  # the other processes may be blocked in a collective of this case
    return runs


@pytest.fixture(scope="module")
def results(
    built_once: Callable[[str, Callable[[Path], Any]], Path], request: pytest.FixtureRequest
) -> Callable[[Shape], Any]:
    """Return a function that trains all selected cases on a mesh, once in a test run."""
    requested = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}

    @cache
    def train(key: tuple[int, int]) -> list[dict[str, Any]]:
        shape = Shape(*key)
        cases = {name: shape.over(overrides) for name, overrides in matrix().items() if name in requested}
        cases = {name: overrides for name, overrides in cases.items() if fits(name, shape)}

        def build(folder: Path) -> None:
            torch.save(shape.run(train_all, write_text(folder), cases, folder), folder / "results.pt")

        return torch.load(built_once(f"same_training_{shape}", build) / "results.pt", weights_only=False)

    return lambda shape: train((shape.data, shape.expert))


def select_run(results: Callable[[Shape], Any], shape: Shape, name: str) -> dict[str, Any]:
    """Return the run of a case on a mesh; fail if it ended with an error or differs between ranks."""
    by_rank = [runs.get(name, "an earlier case failed") for runs in results(shape)]
    errors = [run for run in by_rank if isinstance(run, str)]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
    return trained_alike(by_rank)


QUICK = (Shape(2, 2),)
"""Meshes of `make test`; of copies alone, `test_resharding` and `test_copies_and_scopes` have cases there."""
CASES = [
    pytest.param(shape, name, id=f"{shape}-{name}", marks=() if name in SHORT and shape in QUICK else pytest.mark.slow)
    for shape in SHAPES
    for name in matrix()
    if fits(name, shape)
]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_same_training(results: Callable[[Shape], Any], shape: Shape, name: str) -> None:
    tolerance = TOLERANCES.get(name, {})
    assert_same_training(select_run(results, shape, name), select_run(results, ALONE, name), **tolerance)
