"""Muon: momentum whose matrices are made orthogonal (Keller Jordan, kellerjordan.github.io/posts/muon).

torch.optim.Muon has the same formulas for parameters that are one matrix each. Here a parameter may hold a stack of
matrices, as experts are, or several side by side, and equal shapes are computed in one batch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.experts.bank import local_shard
from moebench.routing.linear_map import LinearMap

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7
"""Matrices with a smaller norm are not scaled up to 1, so that a gradient of 0 stays 0."""
MAX_BATCH_ELEMENTS = 2**25
"""Elements of the matrices that are made orthogonal at a time: each needs three times their memory."""
SCALINGS: Mapping[str, Callable[[float, float], float]] = {
    "original": lambda n_out, n_in: math.sqrt(max(1, n_out / n_in)),
    "match_rms_adamw": lambda n_out, n_in: 0.2 * math.sqrt(max(n_out, n_in)),
}
"""Size of an update, from the shape of a matrix: as `adjust_lr_fn` of torch.optim.Muon."""


def orthogonalize(x_NXY: Tensor) -> Tensor:
    """Return U S V^T for each matrix U D V^T, X <= Y, with singular values S of about 0.7 to 1.2 instead of D.

    Five steps of a Newton-Schulz iteration, in the precision of the argument; singular values far below the largest
    one end below 0.7.
    """
    a, b, c = COEFFICIENTS
    norm_N11 = torch.linalg.vector_norm(x_NXY, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x_NXY = x_NXY / norm_N11.clamp(min=SMALLEST_NORM).to(x_NXY.dtype)
    for _ in range(NUM_ITERATIONS):
        gram_NXX = x_NXY @ x_NXY.mT
        polynomial_NXX = torch.baddbmm(gram_NXX, gram_NXX, gram_NXX, beta=b, alpha=c)
        x_NXY = torch.baddbmm(x_NXY, polynomial_NXX, x_NXY, beta=a)
    return x_NXY


@dataclass(frozen=True, kw_only=True, eq=False)
class _Update:
    """Matrices of one parameter on this process: views [..., output, input]."""

    weight: Tensor
    direction: Tensor
    """Momentum, to be made orthogonal."""
    learning_rate: float

    @property
    def is_tall(self) -> bool:
        return self.direction.shape[-2] > self.direction.shape[-1]

    def stack_direction(self) -> Tensor:
        """Return the direction as [N, X, Y] with X <= Y."""
        wide = self.direction.mT if self.is_tall else self.direction
        return wide.reshape(-1, *wide.shape[-2:])

    def apply(self, orthogonal_NXY: Tensor, scaling: str) -> None:
        """Move the weights against the orthogonal direction."""
        n_out, n_in = self.direction.shape[-2:]
        matrices = orthogonal_NXY.mT if self.is_tall else orthogonal_NXY
        step = matrices.reshape(self.weight.shape).to(self.weight.dtype)
        self.weight.add_(step, alpha=-self.learning_rate * SCALINGS[scaling](n_out, n_in))


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `uses_muon`, AdamW for the others.

    Parameters that are sharded over processes are updated on each process in its own part, which must consist of whole
    matrices.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        linear_maps: Mapping[Tensor, LinearMap],
        *,
        momentum: float,
        scaling: str,
        precision: torch.dtype = torch.float32,
        **adamw: Any,
    ) -> None:
        """`linear_maps`: of the parameters in groups with `uses_muon`. `precision`: of the orthogonalization.

        `adamw`: options of torch.optim.AdamW.
        """
        super().__init__(groups, **adamw)
        self.linear_maps = linear_maps
        self.momentum = momentum
        self.scaling = scaling
        self.precision = precision

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["uses_muon"]]
            super().step()
        finally:
            self.param_groups = groups
        self._update_matrices([group for group in groups if group["uses_muon"]])
        return loss

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects its own state of every parameter

    def _update_matrices(self, groups: Sequence[dict[str, Any]]) -> None:
        by_shape: dict[torch.Size, list[_Update]] = defaultdict(list)
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    for update in self._follow_gradient(parameter, group):
                        by_shape[update.stack_direction().shape[-2:]].append(update)
        for updates in by_shape.values():
            for batch in _split_batches(updates):
                stacks = [update.stack_direction() for update in batch]
                orthogonal_NXY = orthogonalize(torch.cat(stacks).to(self.precision))
                for update, part_NXY in zip(batch, torch.split(orthogonal_NXY, [*map(len, stacks)]), strict=True):
                    update.apply(part_NXY, self.scaling)

    def _follow_gradient(self, parameter: Tensor, group: Mapping[str, Any]) -> Iterator[_Update]:
        """Update the momentum of a parameter and decay its weights; yield the updates of its matrices."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        assert parameter.grad is not None
        weight, grad, mean = map(local_shard, (parameter, parameter.grad, state["momentum_buffer"]))
        mean.lerp_(grad, 1 - self.momentum)
        direction = grad.lerp(mean, self.momentum)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        linear_map = self.linear_maps[parameter]
        for part, direction_part in zip(linear_map.split(weight), linear_map.split(direction), strict=True):
            yield _Update(weight=part, direction=direction_part, learning_rate=group["lr"])


def _split_batches(updates: Sequence[_Update]) -> Iterator[list[_Update]]:
    """Yield the updates in batches of at most `MAX_BATCH_ELEMENTS`, or of one update that is larger."""
    batch: list[_Update] = []
    size = 0
    for update in updates:
        if batch and size + update.direction.numel() > MAX_BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(update)
        size += update.direction.numel()
    yield batch
