"""Sharding a model's experts over the processes of a mesh, before its weights are initialised."""

from collections.abc import Iterator

import torch
from torch import nn

from moebench.experts.bank import Bank
from moebench.experts.layer import MoELayer
from moebench.experts.mixed import MixedBank
from moebench.parallel.exchange import ExpertExchange
from moebench.parallel.mesh import Mesh
from moebench.ranks import SINGLE_RANK, Scopes
from moebench.schema import BalanceConfig


def shard_experts(model: nn.Module, mesh: Mesh, balance: BalanceConfig) -> None:
    """Shard the experts of a model, and give its layers the ranks over which their statistics are computed.

    Call it before weights are initialised, so that each process draws its own experts only. The parameters of E
    experts become a DTensor; this process holds E / `parallel.expert` of them. A DTensor fails where code treats it
    like a plain tensor (a broadcast, stock clipping) instead of giving wrong numbers.
    """
    scopes = Scopes(
        batch=mesh.world if mesh.config.scope == "global" else SINGLE_RANK,
        balance=mesh.world if balance.scope == "global" else SINGLE_RANK,
        world=mesh.world,
    )
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.scopes = scopes
            if mesh.expert_group is not None:
                for bank in iter_sharded_banks(layer.bank):
                    _shard(bank, mesh)


def iter_sharded_banks(bank: Bank) -> Iterator[Bank]:
    """Yield the banks of a layer that are sharded: those whose experts are networks."""
    if isinstance(bank, MixedBank):
        for group in bank.groups:
            assert isinstance(group, Bank)
            yield from iter_sharded_banks(group)
    elif not bank.is_replicated:
        yield bank


def _shard(bank: Bank, mesh: Mesh) -> None:
    # Here because its import takes as long as half of torch, and most runs shard nothing.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert mesh.expert_group is not None
    assert mesh.device_mesh is not None
    bank.exchange = ExpertExchange(mesh.expert_group, mesh.traffic, overlap=mesh.config.overlap)
    for module in bank.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            num_experts = parameter.shape[0] // mesh.config.expert
            shard = torch.empty(num_experts, *parameter.shape[1:], dtype=parameter.dtype, device=mesh.device)
            sharded = DTensor.from_local(shard, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(sharded))
