"""Checks of plug-ins that are too slow for every step, made in the first training step and the first evaluation.

No pass of a model may draw from a global random generator: the numbers would depend on what else the process has drawn,
so a resumed run would not repeat itself. The checks compare the states of the generators before and after.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moebench.plugin_errors import ContractError
from moebench.registry import Entry
from moebench.routing.contract import find_routing_problem
from moebench.routing.layer_losses import check_own_losses
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS, Router
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS
from moebench.training.model import Model

ADVICE = "draw from the generator that is passed in (ctx.uniform, ctx.normal, ctx.random), and use no nn.Dropout"


class FirstPasses:
    """Checks the first training step and the first evaluation of this process if the cell has a plug-in."""

    def __init__(self, config: CellConfig, model: Model) -> None:
        self.model = model
        self.router, self.task = ROUTERS.get(config.router.name), TASKS.get(config.task.name)
        entries: list[Entry[Any, Any]] = [self.router, self.task]
        entries += [LOSSES.get(name) for name in config.router.losses if name in LOSSES.names()]
        self.plugins = [entry for entry in entries if entry.is_plugin]
        self.watched: set[str] = set()
        self.has_checked_losses = False

    @contextlib.contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        """Check the first pass of a kind ("training", "evaluation") that runs in the block.

        Raises ContractError, which names the plug-in's file, for draws from global generators and for wrong routings.
        """
        if not self.plugins or kind in self.watched:
            yield
            return
        self.watched.add(kind)
        device = next(self.model.parameters()).device
        before, handles = _read_states(device), list(self._register_hooks(device))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        owners = ", ".join(entry.label for entry in self.plugins)
        _refuse_draws(before, device, f"{owners}: {kind}")

    def check_losses(self, records: Sequence[LayerRecord]) -> None:
        """Raise ContractError for a loss of a plug-in router that breaks a rule; call with the first pass's records."""
        if not self.router.is_plugin or self.has_checked_losses or not self.router.facts.own_losses:
            return
        self.has_checked_losses = True
        for layer, record in zip(self.model.backbone.moe_layers(), records, strict=True):
            check_own_losses(layer.router, record)

    def _register_hooks(self, device: torch.device) -> Iterator[RemovableHandle]:
        """Check each module of a plug-in separately, so that a message names the one that is wrong."""
        if self.router.is_plugin:
            for layer in self.model.backbone.moe_layers():
                yield from _watch_module(layer.router, device, f"{self.router.label}: forward")
                yield layer.router.register_forward_hook(partial(_check_routing, self.router))
        if self.task.is_plugin:
            for name, module in (("embedding", self.model.embedding), ("head", self.model.head)):
                yield from _watch_module(module, device, f"{self.task.label}: the module of build_{name}")


def _watch_module(module: nn.Module, device: torch.device, label: str) -> Iterator[RemovableHandle]:
    before: list[dict[str, Tensor]] = []

    def note_states(*_: Any) -> None:
        before.append(_read_states(device))

    def compare_states(*_: Any) -> None:
        _refuse_draws(before.pop(), device, label)

    yield module.register_forward_pre_hook(note_states)
    yield module.register_forward_hook(compare_states)


def _check_routing(entry: Entry[Any, Any], router: nn.Module, arguments: tuple[Any, ...], routing: Any) -> None:
    """Check the values of a routing. A forward hook: it runs before `check_routing`, which checks the type."""
    assert isinstance(router, Router)
    if not hasattr(routing, "num_tokens"):
        return  # not a routing: `check_routing` raises the error
    problem = find_routing_problem(routing, len(arguments[0]), router.num_experts)
    if problem:
        raise ContractError(f"{entry.label}: forward {problem}")


def _read_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the global generators that a module on a device can draw from, by name."""
    states = {"torch": torch.get_rng_state(), "numpy": _read_numpy_state()}
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _read_numpy_state() -> Tensor:
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return torch.empty(0)  # a plug-in has set another one
    position = torch.tensor([state["state"]["pos"], state["has_gauss"]])
    return torch.cat([torch.from_numpy(state["state"]["key"].astype("int64")), position])


def _refuse_draws(before: dict[str, Tensor], device: torch.device, label: str) -> None:
    """Raise ContractError, which begins with `label`, if a generator's state has changed."""
    after = _read_states(device)
    for name, state in before.items():
        if not torch.equal(state, after[name]):
            raise ContractError(f"{label} draws from the global random generator of {name}; {ADVICE}")
