"""AdamW and Muon whose state is divided among the processes of a mesh (`parallel.shard_optimizer`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moebench.parallel.mesh import Mesh
from moebench.parallel.parameter_shards import ParameterShard, plan_shards
from moebench.parallel.sharded_optimizer import ShardedOptimizer
from moebench.routing.linear_map import LinearMap
from moebench.training.optimizer.muon import Muon


class ShardedAdamW(ShardedOptimizer, torch.optim.AdamW):
    """AdamW with its state sharded."""

    def __init__(self, groups: Sequence[dict[str, Any]], mesh: Mesh, **options: Any) -> None:
        """`groups`: of the model's parameters. `options`: of torch.optim.AdamW."""
        super().__init__(_plan_groups(groups, mesh), groups, **options)


class ShardedMuon(ShardedOptimizer, Muon):
    """Muon with its state sharded: each matrix is made orthogonal on one process alone."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], mesh: Mesh, linear_maps: Mapping[Tensor, LinearMap], **options: Any
    ) -> None:
        """`groups`, `linear_maps`: of the model's parameters. `options`: of `Muon`."""
        shards = _plan_groups(groups, mesh)
        maps_of_shards = {
            shard.updated: linear_maps[shard.parameter]
            for of_group in shards
            for shard in of_group
            if shard.updated is not None and shard.parameter in linear_maps
        }
        super().__init__(shards, groups, maps_of_shards, **options)


def _plan_groups(groups: Sequence[dict[str, Any]], mesh: Mesh) -> list[list[ParameterShard]]:
    """Return the shards of the parameters of each group."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    has_matrices = [group.get("uses_muon", False) for group in groups for _ in group["params"]]
    shards = iter(plan_shards(parameters, has_matrices, mesh))
    return [[next(shards) for _ in group["params"]] for group in groups]
