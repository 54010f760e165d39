"""Which parameters are updated (`train.trainable`): the others have no gradient and no state in the optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.experts.bank import is_sharded, local_shard
from moebench.optimizer_config import PARAMETER_GROUPS, ParameterGroup
from moebench.schema import TrainConfig
from moebench.training.model import Model
from moebench.training.optimizer.groups import describe_parameters

GROUPS: Mapping[str, tuple[ParameterGroup, ...]] = {
    "all": PARAMETER_GROUPS,
    "experts": ("experts",),
    "routers": ("router",),
    "shared": ("hidden", "embeddings", "head"),
    "new_experts": ("experts",),
}
"""Value of `train.trainable` -> groups with parameters that are updated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenExperts:
    """Experts of a stack that stay as they are while others of it are updated."""

    parameter: nn.Parameter
    local_expert_F: Tensor
    """Positions in the part of the stack that is on this process."""
    value_FX: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, new_experts: Sequence[int]) -> "FrozenExperts":
        """Freeze the experts that are not new at their present values."""
        local = local_shard(parameter.detach())
        first = local.shape[0] * parameter.device_mesh.get_local_rank("expert") if is_sharded(parameter) else 0
        frozen = [index for index in range(local.shape[0]) if first + index not in set(new_experts)]
        expert_F = torch.tensor(frozen, dtype=torch.long, device=local.device)
        return cls(parameter=parameter, local_expert_F=expert_F, value_FX=local[expert_F].clone())

    @torch.no_grad()
    def clear_gradient(self) -> None:
        """Set their gradient to 0, so that they count neither in its norm nor in the state of the optimizer."""
        if self.parameter.grad is not None:
            local_shard(self.parameter.grad).index_fill_(0, self.local_expert_F.to(self.parameter.device), 0.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what weight decay has changed."""
        local = local_shard(self.parameter.detach())
        local[self.local_expert_F.to(local.device)] = self.value_FX.to(local.device)


def freeze_parameters(model: Model, train: TrainConfig) -> list[FrozenExperts]:
    """Turn off the gradients of parameters that are not updated; return the frozen experts of stacks with new ones.

    Raises UsageError where nothing is left to train.
    """
    if train.trainable == "all":
        return []
    partly: list[FrozenExperts] = []
    for role in describe_parameters(model):
        is_trained = role.group in GROUPS[train.trainable]
        if is_trained and train.trainable == "new_experts":
            new = model.new_experts.get(role.name, ())
            is_trained = bool(new)
            if 0 < len(new) < role.parameter.shape[0]:
                partly.append(FrozenExperts.of(role.parameter, new))
        role.parameter.requires_grad_(is_trained and role.parameter.requires_grad)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"train.trainable: '{train.trainable}' leaves nothing to train, the model has no such parameters"
        )
    return partly


def updates_router_state(train: TrainConfig) -> bool:
    """Return whether routers update their state, such as biases that balance loads."""
    return "router" in GROUPS[train.trainable]


def restore_after_updates(optimizer: torch.optim.Optimizer, frozen: Sequence[FrozenExperts]) -> None:
    """Let each update of an optimizer end with the values of frozen experts."""

    def restore(*_: Any) -> None:
        for experts in frozen:
            experts.restore()

    if frozen:
        optimizer.register_step_post_hook(restore)
