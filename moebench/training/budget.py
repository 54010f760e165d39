"""Hold the executed FLOPs per token of a model at those of the dense one (`layout.match=measured_flops`).

What is adjusted is declared by the router: an attribute that sets how many experts tokens use (`Facts.budget`), one
setting for all layers. In training an integral controller moves it after every step, by the FLOPs that all processes
executed, so that the mean over all steps reaches the target. After the last step the setting of evaluation is found
on the validation split, by FLOPs alone, and then stays: routers may route otherwise in evaluation than in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebench.experts.knobs import find_knobs
from moebench.models.cost import executed_flops_per_token
from moebench.models.storageless import build_without_storage
from moebench.parallel.mesh import Mesh
from moebench.routing.budget import Knob
from moebench.routing.router import ROUTERS, Router
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.executed_cost import Column, ExecutedCost
from moebench.training.model import Model, build_model, compute_model_cost

GAIN = 0.2
"""Change of the setting in a step, per excess of that step relative to the planned FLOPs of routers and experts. It is
stable where a change of the setting by 1 changes these FLOPs by less than 10 times the planned ones."""
CORRECTION_SHARE = 0.1
"""Share of all steps over which the excess of earlier steps is made up for."""
MAX_CORRECTION = 0.5
"""Largest excess, of either sign, that a step aims at in order to make up for earlier ones."""
LAST_SHARE = 0.1
"""Share of all steps, at the end, whose mean is reported by itself."""
PRECISION = 0.0025
"""Relative distance to the target at which the search for the setting of evaluation ends."""
MAX_EVALUATIONS = 16
"""Largest number of evaluations of the search."""

ON_DEVICE = ("setting", "excess", "last_flops")
"""State that is on the device of training."""


@dataclass(frozen=True)
class ControlledRouter:
    """A router whose knob is a buffer, and the value that it was built with."""

    router: Router
    knob: Knob
    start: float

    def set(self, setting: Tensor) -> None:
        """Set the value for the next forward passes."""
        getattr(self.router, self.knob.attribute).copy_(self.knob.to_values(self.start, setting))


def compute_target(config: CellConfig, task: Task) -> int:
    """Return the planned forward FLOPs per token of the dense model of the same configuration."""
    dense = replace(config, router=ROUTERS.get("dense").item.Config(name="dense"))
    with build_without_storage():
        model = build_model(dense, task)
        return compute_model_cost(model, task.sequence_length, task.decoder_length).flops_per_token


class Budget:
    """The controller of one cell; its state is part of every checkpoint, and the same on all processes.

    What it measures and sets in training stays on the device, so that a step does not wait for it.
    """

    def __init__(self, config: CellConfig, model: Model, task: Task, target: int) -> None:
        self.target = target
        self.num_steps = config.train.steps
        self.model, self.task = model, task
        self.layers = model.backbone.moe_layers()
        self.routers = [
            ControlledRouter(router, knob, float(getattr(router, knob.attribute)))
            for router, knob in find_knobs(self.layers)
        ]
        length = task.sequence_length
        self.scale = float(sum(layer.routed_flops_per_token(length) for layer in self.layers))
        lengths = task.sequence_length, task.decoder_length
        self.planned = compute_model_cost(model, *lengths).flops_per_token
        self.step = 0
        self.setting = torch.zeros((), dtype=torch.float64)
        self.excess = torch.zeros((), dtype=torch.float64)
        """Sum over the steps of what was executed beyond the target, relative to `scale`."""
        self.last_flops = torch.zeros((), dtype=torch.float64)
        """Sum over the last steps of the executed FLOPs per token."""
        self.final_setting: float | None = None
        """Setting for evaluation, after the last step."""

    @property
    def acts_in_training(self) -> bool:
        """Whether the knob changes what training executes."""
        return any(router.knob.in_training for router in self.routers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        numbers = {name: float(getattr(self, name)) for name in ON_DEVICE}
        return numbers | {"step": self.step, "final_setting": self.final_setting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the values of the knobs are buffers of the model."""
        for name, value in state.items():
            setattr(self, name, torch.tensor(value, dtype=torch.float64) if name in ON_DEVICE else value)

    def update(self, records: Sequence[Sequence[LayerRecord]], mesh: Mesh) -> None:
        """Adjust the setting by what a step executed; every process calls it."""
        flops = self._measure(records, mesh)
        for name in ON_DEVICE:
            setattr(self, name, getattr(self, name).to(mesh.device))
        self.step += 1
        if self.step > (1 - LAST_SHARE) * self.num_steps:
            self.last_flops = self.last_flops + flops
        if not self.acts_in_training:
            return
        excess = (flops - self.target) / self.scale
        self.excess = self.excess + excess
        correction = self.excess / max(CORRECTION_SHARE * self.num_steps, 1)
        correction = correction.clamp(-MAX_CORRECTION, MAX_CORRECTION)
        self._set(self.setting - GAIN * (excess + correction))

    def freeze(self, evaluate_flops: Callable[[], float]) -> None:
        """Find the setting at which evaluation reaches the target, and keep it; every process calls it.

        `evaluate_flops`: returns the FLOPs per token on the validation split at the current setting. Brackets the
        target from the last setting of training, then halves the interval; of the settings tried the nearest is kept.
        """
        if not self.routers:
            return
        tried: dict[float, float] = {}
        setting, stride = float(self.setting), 0.125
        while len(tried) < MAX_EVALUATIONS:
            self._set(torch.tensor(setting, dtype=torch.float64))
            setting = float(self.setting)  # within the bounds of the value
            if setting in tried:
                break
            tried[setting] = evaluate_flops() / self.target - 1
            if abs(tried[setting]) <= PRECISION:
                break
            below = max((each for each, error in tried.items() if error < 0), default=None)
            above = min((each for each, error in tried.items() if error > 0), default=None)
            if below is None or above is None:
                setting += stride if above is None else -stride
                stride *= 2
            else:
                setting = (below + above) / 2
        self.final_setting = min(tried, key=lambda each: abs(tried[each]))
        self._set(torch.tensor(self.final_setting, dtype=torch.float64))

    def to_cost(self) -> dict[str, float]:
        """Return what the result of the run reports."""
        num_last = max(self.num_steps - int((1 - LAST_SHARE) * self.num_steps), 1)
        cost = {
            "target_flops_per_token": float(self.target),
            "train_last_flops_per_token": float(self.last_flops) / num_last,
        }
        if self.routers:
            first, final = self.routers[0], self.final_setting
            cost["budget_value"] = first.knob.to_value(first.start, float(self.setting) if final is None else final)
        return cost

    def _measure(self, records: Sequence[Sequence[LayerRecord]], mesh: Mesh) -> Tensor:
        """Return the executed FLOPs per token of all processes; the target where they had no tokens."""
        executed = ExecutedCost(self.layers)
        for of_pass in records:
            executed.add(of_pass)
        sums_LX = executed.take_pending(mesh)
        positions_L = sums_LX[:, Column.POSITIONS]
        excess_L = sums_LX[:, Column.EXCESS_FLOPS] / positions_L
        excess = {layer.name: excess_L[n] for n, layer in enumerate(self.layers)}
        lengths = self.task.sequence_length, self.task.decoder_length
        flops = executed_flops_per_token(self.model.backbone, self.planned, excess, *lengths)
        assert isinstance(flops, Tensor)
        return flops.where((positions_L > 0).all(), float(self.target))

    def _set(self, setting: Tensor) -> None:
        if self.routers:
            first = self.routers[0]
            self.setting = setting.clamp(*first.knob.find_bounds(first.start))
        for router in self.routers:
            router.set(self.setting)


def build_budget(config: CellConfig, model: Model, task: Task) -> Budget | None:
    """Return the controller of a cell; None unless its layout asks for it and the model has experts."""
    if config.layout.match != "measured_flops" or not model.backbone.moe_layers():
        return None
    return Budget(config, model, task, compute_target(config, task))
