"""Spreading a model's experts over the processes of a mesh, when the model is built."""

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moebench.errors import UsageError
from moebench.experts.bank import Bank
from moebench.experts.layer import MoELayer
from moebench.experts.layout import Experts
from moebench.experts.mixed import WITHOUT_NETWORK, MixedBank
from moebench.parallel.exchange import ExpertExchange
from moebench.parallel.mesh import Mesh
from moebench.ranks import SINGLE_RANK, Scopes
from moebench.schema import BalanceConfig


def shard_experts(model: nn.Module, mesh: Mesh, balance: BalanceConfig) -> None:
    """Make a model one of many processes: before its weights are drawn, so that each draws its own experts only.

    A stack of E experts becomes a DTensor of which this process holds E / `parallel.expert`: whatever treats it like
    a plain tensor (DDP's broadcast, stock clipping) then fails instead of being wrong.
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
                    _spread(bank, mesh)


def iter_sharded_banks(bank: Bank) -> Iterator[Bank]:
    """Yield the banks of a layer whose experts are spread: those that have networks."""
    if isinstance(bank, MixedBank):
        for group in bank.groups:
            assert isinstance(group, Bank)
            yield from iter_sharded_banks(group)
    elif not bank.is_replicated:
        yield bank


def check_spread(experts: Experts, num_processes: int, layout: str) -> None:
    """Raise UsageError when the experts of a bank cannot be dealt out evenly."""
    for shape, equal in itertools.groupby(experts.shapes):
        number = len(list(equal))
        if shape.kind in WITHOUT_NETWORK or (number % num_processes == 0 and shape.kind != "stack"):
            continue
        if shape.kind == "stack":
            raise UsageError(
                f"parallel.expert={num_processes}: the experts of layout '{layout}' are whole models, which stay on"
                " every process (try parallel.expert=1 and parallel.data)"
            )
        alike = "experts" if number == len(experts.shapes) else "experts of one kind"
        fits = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise UsageError(
            f"parallel.expert={num_processes} does not divide the {number} {alike} of layout '{layout}' (try {fits})"
        )


def _spread(bank: Bank, mesh: Mesh) -> None:
    assert mesh.expert_group is not None
    assert mesh.device_mesh is not None
    bank.exchange = ExpertExchange(mesh.expert_group, mesh.traffic, overlap=mesh.config.overlap)
    for module in bank.modules():
        for name, whole in list(module.named_parameters(recurse=False)):
            own = torch.empty(
                whole.shape[0] // mesh.config.expert, *whole.shape[1:], dtype=whole.dtype, device=mesh.device
            )
            spread = DTensor.from_local(own, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(spread))
