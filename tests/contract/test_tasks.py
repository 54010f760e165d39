"""Every task with every layout and one router of each family: one training step, or a refusal with a reason."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.case_selection import PLAIN_LAYOUT
from support.task_data import write_data
from support.training_cases import TINY

from moebench.compatibility import check_cell
from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.experts.layout import LAYOUTS
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, Task
from moebench.training.evaluation import batch_context, evaluate
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule

NUM_EXPERTS = 4


def one_of_each_family() -> list[str]:
    """Return the first router of each family that works with so few experts."""
    router_of_family: dict[str, str] = {}
    for entry in ROUTERS.entries():
        if entry.item.form.is_dense or entry.facts.family in router_of_family:
            continue
        try:
            entry.item.check(entry.item.Config(), NUM_EXPERTS)
        except UsageError:
            continue
        router_of_family[entry.facts.family] = entry.name
    return sorted(router_of_family.values())


def triples() -> list[Any]:
    """Return all triples; not slow: each router on the plain layout, and each layout with one router in turn."""
    routers = itertools.cycle(one_of_each_family())
    quick = {(task, layout, next(routers)) for task, layout in itertools.product(TASKS.names(), LAYOUTS.names())}
    quick |= {(task, PLAIN_LAYOUT, router) for task in TASKS.names() for router in one_of_each_family()}
    every = itertools.product(TASKS.names(), LAYOUTS.names(), one_of_each_family())
    return [pytest.param(*each, marks=() if each in quick else pytest.mark.slow) for each in every]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CellConfig], Task]:
    folder: Path = tmp_path_factory.mktemp("cache")
    tasks: dict[str, Task] = {}

    def of(config: CellConfig) -> Task:
        name = config.task.name
        return tasks[name] if name in tasks else tasks.setdefault(name, prepare_task(config, folder))

    return of


def test_every_task_has_data(data: Mapping[str, Mapping[str, Any]]) -> None:
    assert set(data) == set(TASKS.names())


@pytest.mark.parametrize(("task", "layout", "router"), triples())
def test_one_training_step_or_refusal(task: str, layout: str, router: str, data: Any, prepared: Any) -> None:
    plain: dict[str, Any] = {"model": TINY["model"], "train": TINY["train"]}
    changes = {
        "task": {"name": task, **data[task]},
        "layout": {"name": layout, "num_experts": NUM_EXPERTS, "match": "none"},
        "router": {"name": router},
    }
    try:
        config = resolve(merge_settings(plain, changes))
        check_cell(config)
        ready: Task = prepared(config)
        module = CellModule(config, build_initialised_model(config, ready), ready)
    except UsageError as error:
        reason = str(error)
    else:
        reason = ""
        train_one_step(module)
    assert "\n" not in reason
    assert not reason or any(key in reason for key in ("router", "layout", "task", "train"))


def train_one_step(module: CellModule) -> None:
    """Take a training step, then evaluate; check that results are finite and parameters have changed."""
    config, ready = module.config, module.task
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    batch = ready.train_batch(config.train.batch_size, 0, 0)
    outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
    losses, _ = module.compute_loss(batch, outputs, records)
    losses.total.backward()
    torch.optim.AdamW(module.parameters(), lr=1e-3).step()
    assert losses.total.isfinite()
    assert any(not torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    quality = evaluate(module.model, ready, ready.eval_batches("test", 4)[:1], 0, "cpu").quality
    assert TASKS.get(config.task.name).facts.metric in quality
