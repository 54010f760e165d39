"""What several contract tests of routers share: well-formed routings, losses, notes in failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.cases import Case
from torch import Tensor

from moebench.routing.losses import LOSSES
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import Router
from moebench.routing.values import AnyRouting, LayerRecord


@contextmanager
def note_in_failure(**values: Any) -> Iterator[None]:
    """Add the given values to the message of a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note("with " + ", ".join(f"{name}={value}" for name, value in values.items()))
        raise


def compute_raw_losses(router: Router, record: LayerRecord) -> dict[str, Tensor]:
    """Return every loss that the router has a coefficient for or defines itself."""
    router_losses = router.losses(record)
    shared = {name: LOSSES.get(name).item(record) for name in router.config.losses if name not in router_losses}
    return router_losses | shared


def learns_from_own_loss(case: Case, name: str) -> bool:
    """Return whether a parameter is trained by the router's own losses or objective only."""
    return any(name == part or name.startswith(f"{part}.") for part in case.facts.trained_by_own_loss)


def assert_well_formed(routing: AnyRouting) -> None:
    """Fail unless shapes, types and values of a routing are those that every layer may rely on."""
    if isinstance(routing, MergeRouting):
        assert_well_formed_merge(routing)
        return
    if isinstance(routing, SoftRouting):
        assert_well_formed_soft(routing)
        return
    num_assignments = routing.token_N.numel()
    assert routing.token_N.dtype == routing.expert_N.dtype == torch.int64
    assert routing.weight_N.dtype == torch.float32
    assert routing.expert_N.shape == routing.weight_N.shape == (num_assignments,)
    if num_assignments:
        assert 0 <= int(routing.token_N.min()) <= int(routing.token_N.max()) < routing.num_tokens
        assert 0 <= int(routing.expert_N.min()) <= int(routing.expert_N.max()) < routing.num_experts
    pair_N = routing.token_N * routing.num_experts + routing.expert_N
    assert pair_N.unique().numel() == num_assignments, "duplicate assignment"
    assert torch.isfinite(routing.weight_N).all()
    assert (routing.weight_N >= 0).all()
    for table_TE in (routing.logits_TE, routing.scores_TE):
        if table_TE is not None:
            assert table_TE.dtype == torch.float32
            assert table_TE.shape == (routing.num_tokens, routing.num_experts)
            assert torch.isfinite(table_TE).all()
    if routing.top_k is not None:
        rectangle_N = torch.arange(routing.num_tokens).repeat_interleave(routing.top_k)
        assert torch.equal(routing.token_N, rectangle_N)
    if routing.priority_N is not None:
        assert routing.priority_N.shape == (num_assignments,)


def assert_well_formed_soft(routing: SoftRouting) -> None:
    for weight_BLS in (routing.dispatch_BLS, routing.combine_BLS):
        assert weight_BLS.dtype == torch.float32
        assert weight_BLS.shape == routing.dispatch_BLS.shape
        assert (weight_BLS >= 0).all()
    sums = [routing.dispatch_BLS.sum(1)]
    if routing.combine_BLS is not routing.dispatch_BLS:  # routers that use one softmax for both, over tokens
        sums.append(routing.combine_BLS.sum(2))
    for summed in sums:
        torch.testing.assert_close(summed, torch.ones_like(summed))
    assert routing.dispatch_BLS.shape[2] == routing.num_experts * routing.slots_per_expert


def assert_well_formed_merge(routing: MergeRouting) -> None:
    assert routing.weight_GE.dtype == torch.float32
    assert (routing.weight_GE >= 0).all()
    torch.testing.assert_close(routing.weight_GE.sum(1), torch.ones(routing.weight_GE.shape[0]))
    assert routing.weight_TE.shape == (routing.num_tokens, routing.num_experts)
    assert routing.logits_TE is not None
    assert routing.logits_TE.shape == (routing.num_tokens, routing.num_experts)
    assert routing.logits_TE.dtype == torch.float32
