"""The alarm of a collapse: a layer that sends nearly all tokens to the same few experts.

Loads are added up on the device in every step; every `WINDOW_STEPS` steps their sum travels to the host with the other
values of the step, for which the host waits anyway. A layer is collapsed when, in two windows in a row, the j busiest
of its E experts take at least `COLLAPSED` of what they could have beyond an even load, for any j from 1 to the router's
number k of experts per token: (s - a j/E) / (m - a j/E), where a, s and m are assignments per token: all of them, those
to the j experts, and the most that these could have, min(j, a), as a token goes to an expert once. So a single expert
that takes every token is found whatever the other choices of the tokens are. Where tokens use more than k experts
(a > k), m is j a/k: that one of many experts serves every token is no collapse. The alarm comes at most
3 * WINDOW_STEPS steps after a collapse, one more where steps are checked later.

Routers that choose nothing (mixtures, chains of steps, fixed tables) have no alarm; neither have those that use
more than half of the experts for a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.ranks import Ranks
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord

WINDOW_STEPS = 5
COLLAPSED, RECOVERED = 0.9, 0.5
"""Share of what the busiest experts could have beyond an even load; above the first a layer counts as collapsed, below
the second as recovered."""
NUM_WINDOWS = 2
"""In a row."""


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A layer that has collapsed, or has recovered from it."""

    step: int
    """From 1: the last of the windows."""
    layer: str
    experts: tuple[int, ...]
    """The busiest ones, from the busiest on."""
    share: float
    """Share of the assignments that they could have in the last window, usually one per token and expert."""
    num_experts: int
    leaves_others: bool = False
    """Tokens use more experts than these; `share` is of tokens then."""
    has_recovered: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """Values for the journal."""
        stem = f"collapse/{self.layer}"
        if self.has_recovered:
            return {f"{stem}/recovered": self.share}
        return {
            f"{stem}/expert": float(self.experts[0]),
            f"{stem}/num_experts": float(len(self.experts)),
            f"{stem}/share": self.share,
        }

    def __str__(self) -> str:
        """Return the event in one line."""
        if self.has_recovered:
            return f"at step {self.step} layer {self.layer} is no longer collapsed"
        one = len(self.experts) == 1
        numbers = ", ".join(map(str, self.experts[:4])) + (", ..." if len(self.experts) > 4 else "")
        who = f"expert {numbers} takes" if one else f"experts {numbers} {'each ' * self.leaves_others}take"
        what = "tokens" if self.leaves_others else "assignments"
        return (
            f"collapse at step {self.step}: in layer {self.layer} {who} {self.share:.0%} of the {what}"
            f" ({self.num_experts} experts, steps {self.step - NUM_WINDOWS * WINDOW_STEPS + 1} to {self.step})"
        )


def can_collapse(layer: MoELayer) -> bool:
    """Return whether the router of a layer learns to choose, for each token, at most half of several experts.

    Where a token uses more of them, their loads say little: the six busiest of eight have three quarters when even.
    """
    form, facts = layer.router.form, ROUTERS.get(layer.router.config.name).facts
    chooses = facts.learned and not (form.is_mixture or form.is_chain or form.is_dense)
    return chooses and 2 * layer.experts_per_token <= layer.bank.num_experts


class LoadWindow:
    """The loads of all watched layers, added up over the steps of a window without waiting for the device."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.indices = [index for index, layer in enumerate(layers) if can_collapse(layer)]
        self.sizes = [layers[index].bank.num_experts + 1 for index in self.indices]
        """Numbers of a layer: the load of each expert, and the tokens."""
        self._local_X: Tensor | None = None
        self._total_X: Tensor | None = None
        """Totals over all processes, of the steps before the last checkpoint."""

    def add(self, records: Sequence[Sequence[LayerRecord]]) -> None:
        """Add the records of a step: for each micro-batch one of each layer."""
        if not self.indices:
            return
        tokens: dict[tuple[int, int], Tensor] = {}  # counted once for layers of the same tokens
        parts = []
        for layers in records:
            for index in self.indices:
                record = layers[index]
                key = record.routing.num_tokens, id(record.valid_T)
                if key not in tokens:
                    tokens[key] = _count_tokens(record)
                parts += [record.routing.load_E, tokens[key]]
        load_X = torch.cat(parts)
        if len(records) > 1:
            load_X = load_X.view(len(records), -1).sum(0)
        self._local_X = load_X if self._local_X is None else self._local_X + load_X

    def close(self, world: Ranks) -> Tensor | None:
        """Return the sums of all processes and begin the next window; every process calls it. None without layers."""
        self.sum_over(world)
        total_X, self._total_X = self._total_X, None
        return total_X

    def sum_over(self, world: Ranks) -> None:
        """Add what other processes have counted, before a checkpoint; every process calls it."""
        if self._local_X is None:
            return
        summed_X = world.sum(self._local_X)
        self._total_X = summed_X if self._total_X is None else self._total_X + summed_X
        self._local_X = None

    def to_list(self) -> list[int]:
        """Return the sums up to the last `sum_over`, for a checkpoint."""
        numbers: list[int] = [] if self._total_X is None else self._total_X.tolist()
        return numbers

    def load_list(self, numbers: Sequence[int], device: torch.device) -> None:
        """Restore the sums."""
        if len(numbers) == sum(self.sizes) and numbers:
            self._total_X = torch.tensor(numbers, device=device)


def _count_tokens(record: LayerRecord) -> Tensor:
    """Return the number of tokens of a record without padding, int64 of one element."""
    if record.valid_T is None:
        return record.routing.load_E.new_full((1,), record.routing.num_tokens)
    return record.valid_T.sum().view(1)


@dataclass
class _LayerState:
    num_windows: int = 0
    """In a row that speak for the other state than the present one."""
    is_collapsed: bool = False


@dataclass(frozen=True, kw_only=True)
class Concentration:
    """What the busiest experts of a layer take in a window."""

    experts: tuple[int, ...]
    share: float
    """As `Collapse.share`."""
    excess: float
    """Share of what they could have beyond an even load."""
    leaves_others: bool
    """As in `Collapse`."""


def list_concentrations(loads: Sequence[float], num_tokens: float, top_k: int) -> list[Concentration]:
    """Return the concentration of the busiest 1, 2, ... `top_k` experts; nothing for a window without assignments."""
    total, num_experts = sum(loads), len(loads)
    if not total:
        return []
    order = sorted(range(num_experts), key=lambda expert: -loads[expert])
    most_of_one = max(num_tokens, total / top_k)
    concentrations, taken = [], 0.0
    for number, expert in enumerate(order[:top_k], start=1):
        taken += loads[expert]
        even, most = number * total / num_experts, min(number * most_of_one, total)
        concentrations.append(
            Concentration(
                experts=tuple(order[:number]),
                share=taken / most,
                excess=(taken - even) / (most - even),
                leaves_others=most < total,
            )
        )
    return concentrations


class CollapseAlarm:
    """Compares the windows of a run with the rule; equal on all processes, which have the same sums."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        watched = [layer for layer in layers if can_collapse(layer)]
        self.layers = {str(layer.name): (layer.bank.num_experts, layer.experts_per_token) for layer in watched}
        """Name -> experts, and those of them that a token uses."""
        self._states = {name: _LayerState() for name in self.layers}

    @property
    def num_collapsed(self) -> int:
        """Layers that are collapsed."""
        return sum(state.is_collapsed for state in self._states.values())

    def check(self, step: int, loads: Sequence[float]) -> list[Collapse]:
        """Return the layers that have changed their state with the window that ends at `step`, from 1.

        `loads`: as `LoadWindow.close` returns them, as numbers.
        """
        events, start = [], 0
        for name, (num_experts, top_k) in self.layers.items():
            *window, num_tokens = loads[start : start + num_experts + 1]
            start += num_experts + 1
            event = self._check_layer(step, name, list_concentrations(window, num_tokens, top_k))
            events += [event] if event else []
        return events

    def _check_layer(self, step: int, name: str, concentrations: Sequence[Concentration]) -> Collapse | None:
        if not concentrations:
            return None
        state = self._states[name]
        collapsed = [each for each in concentrations if each.excess >= COLLAPSED]
        highest = max(concentrations, key=lambda each: each.excess)
        differs = highest.excess < RECOVERED if state.is_collapsed else bool(collapsed)
        state.num_windows = state.num_windows + 1 if differs else 0
        if state.num_windows < NUM_WINDOWS:
            return None
        state.num_windows, state.is_collapsed = 0, not state.is_collapsed
        # All experts that take nearly everything, without idle ones where tokens use fewer than they may.
        named = next((each for each in collapsed if not each.leaves_others), (collapsed or concentrations)[-1])
        return Collapse(
            step=step,
            layer=name,
            experts=named.experts,
            share=named.share,
            num_experts=self.layers[name][0],
            leaves_others=named.leaves_others,
            has_recovered=not state.is_collapsed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        return {name: [state.num_windows, state.is_collapsed] for name, state in self._states.items()}

    def load_dict(self, values: Mapping[str, Any]) -> None:
        """Restore the state."""
        for name in self._states.keys() & values.keys():
            num_windows, is_collapsed = values[name]
            self._states[name] = _LayerState(num_windows=int(num_windows), is_collapsed=bool(is_collapsed))
