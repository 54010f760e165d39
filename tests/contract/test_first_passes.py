"""The checks of plug-ins refuse no router and no layout of moebench itself."""

from pathlib import Path
from typing import Any

import pytest
from support.training_cases import tiny_config, write_text

from moebench.compatibility import check_cell
from moebench.errors import UsageError
from moebench.experts.contract import plan_layout
from moebench.experts.layout import LAYOUTS
from moebench.plugin_errors import ContractError
from moebench.registry import Entry
from moebench.routing.contract import build_router
from moebench.routing.router import ROUTERS
from moebench.tasks.task import Task
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def task(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return prepare_task(tiny_config(text), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    "layout",
    [{}, pytest.param({"name": "hierarchical", "groups": 2}, marks=pytest.mark.slow)],
    ids=["plain", "groups"],
)
@pytest.mark.parametrize("router", ROUTERS.names())
def test_routers(text: Path, task: Task, monkeypatch: pytest.MonkeyPatch, router: str, layout: dict[str, Any]) -> None:
    monkeypatch.setattr(Entry, "is_plugin", property(lambda _: True))
    monkeypatch.setattr(f"{build_router.__module__}.is_plugin", lambda _: True)
    sizes = {"num_experts": 16, "match": "none", "expert_width": None}
    train = {"batch_size": 8}
    config = tiny_config(text, router=router, layout=sizes | layout, train=train, allow_noncausal=True)
    try:
        check_cell(config)
        module = CellModule(config, build_initialised_model(config, task), task)
    except ContractError:
        raise
    except UsageError as error:
        pytest.skip(str(error))
    batch = task.train_batch(8, 0, 0)
    with module.first_passes.watch("training"):
        module.compute_loss(batch, *module.run_passes(batch, batch_context(batch, training=True, seed=0)))
    module.evaluate("validation")
    assert module.first_passes.watched == {"training", "evaluation"}


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_layouts(name: str) -> None:
    with_options = LAYOUTS.get(name).item.Config(num_experts=4)  # type: ignore[call-arg]
    try:
        assert plan_layout(with_options, num_layers=4)
    except ContractError:
        raise
    except UsageError as error:
        pytest.skip(str(error))
