"""An optimizer whose state is divided among the processes with equal copies of a parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.parallel.optimizer_state import complete_state
from moebench.parallel.parameter_shards import ParameterShard, gather_updates


class ShardedOptimizer(torch.optim.Optimizer):
    """Makes any optimizer update the shards of this process alone: `class ShardedAdamW(ShardedOptimizer, AdamW)`.

    The groups of the optimizer hold `ParameterShard.updated`. Each step takes their gradients from the model's
    parameters and ends with all processes having all updates. Every process must call `step`.
    """

    def __init__(
        self, shards: Sequence[Sequence[ParameterShard]], groups: Sequence[dict[str, Any]], *args: Any, **options: Any
    ) -> None:
        """`shards`: of each of the `groups`, whose `params` are replaced. The rest is for the optimizer."""
        groups = [
            {**group, "params": [shard.updated for shard in of_group if shard.updated is not None]}
            for group, of_group in zip(groups, shards, strict=True)
        ]
        super().__init__(groups, *args, **options)
        self.shards_by_group = shards
        self.shards = [shard for of_group in shards for shard in of_group]

    @override
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for shard in self.shards:
            shard.read_parameter()
        super().step()
        self._release_gradients()
        gather_updates(self.shards)
        return loss

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for shard in self.shards:
            shard.parameter.grad = None

    def state_by_name(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """Return the state on this process for a checkpoint, in the format of `flatten_optimizer_state_dict`.

        Tensors are parts of the full ones and share the memory of the state. `names`: of the model's parameters.
        """
        values: dict[str, Any] = {}
        complete_state(self, super().step)
        for group, of_group in zip(self.param_groups, self.shards_by_group, strict=True):
            for shard in of_group:
                name = names[shard.parameter]
                for key, value in (self.state[shard.updated] if shard.updated is not None else {}).items():
                    is_part = shard.updated is not None and value.shape == shard.updated.shape
                    values[f"state.{name}.{key}"] = shard.to_checkpoint(value) if is_part else value
                settings = {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
                values.update(settings)
        return values

    def load_settings(self, values: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        """Set the options of the groups from the values of a checkpoint, as `state_by_name` returns them."""
        for group, of_group in zip(self.param_groups, self.shards_by_group, strict=True):
            prefix = f"param_groups.{names[of_group[0].parameter]}."
            for key in group:
                if key != "params":
                    group[key] = values[f"{prefix}{key}"]

    def _release_gradients(self) -> None:
        """Drop the gradients of the shards: as views they would keep those of the parameters in memory."""
        for shard in self.shards:
            if shard.updated is not None:
                shard.updated.grad = None


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state on this process."""
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes for tensor in tensors)
