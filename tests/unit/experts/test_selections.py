"""Lists that keep unused assignments, as on a GPU, give what shortened ones give: outputs, gradients and dropping."""

from typing import Any

import pytest
import torch
from support.cases import D_MODEL, Case
from torch import Tensor

from moebench.experts import bank_pass
from moebench.experts.capacity import Capacity
from moebench.experts.overflow import BatchAssignments
from moebench.ranks import SINGLE_RANK, Span
from moebench.routing import selection
from moebench.routing.context import RouteContext
from moebench.routing.values import LayerRecord, Routing

ROUTERS = ("dynmoe", "expert_threshold", "mixture_of_depths", "null_experts", "top_p")
NUM_TOKENS = 32


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (selection, bank_pass):
        monkeypatch.setattr(module, "can_read_without_waiting", lambda device: False)


def compute(case: Case, capacity: Capacity) -> tuple[LayerRecord, list[Tensor]]:
    """Return the record, and the output with the gradients of the input and the parameters."""
    layer = case.layer(capacity=capacity)
    x_TD = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1)).requires_grad_()
    context = RouteContext(training=True, generator=torch.Generator().manual_seed(2), sequence_length=NUM_TOKENS)
    y_TD, record = layer(x_TD, context)
    leaves = [x_TD, *layer.parameters()]
    gradients = torch.autograd.grad(y_TD.square().sum(), leaves, allow_unused=True)
    return record, [y_TD, *(grad for grad in gradients if grad is not None)]


@pytest.mark.parametrize("overflow", ["dropless", "drop", "pass", "reroute"])
@pytest.mark.parametrize("num_experts", [4, 16])
@pytest.mark.parametrize("router", ROUTERS)
def test_unused_assignments_change_nothing(
    router: str, num_experts: int, overflow: Any, request: pytest.FixtureRequest
) -> None:
    case = Case(router, num_experts)
    capacity = Capacity() if overflow == "dropless" else Capacity(train=0.5, eval=0.5, overflow=overflow)
    record, short = compute(case, capacity)
    request.getfixturevalue("as_on_a_gpu")
    masked_record, masked = compute(case, capacity)
    assert isinstance(record.routing, Routing)
    assert isinstance(masked_record.routing, Routing)
    assert masked_record.routing.expert_N.numel() > record.routing.expert_N.numel()
    for ours, theirs in zip(masked, short, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in ("load_E", "importance_E", "num_dropped", "num_rerouted", "num_unserved"):
        assert torch.equal(torch.as_tensor(getattr(masked_record, name)), torch.as_tensor(getattr(record, name))), name
    if overflow == "reroute" and router == "top_p":
        assert record.num_rerouted > 0


def test_long_lists_are_shortened_before_the_experts(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    monkeypatch.setattr(
        "moebench.experts.feed_forward.compute_fused_mixture",
        lambda x_TD, routing, *weights, **options: computed.append(routing.expert_N.numel()) or torch.zeros_like(x_TD),
    )
    for router, num_experts, is_short in (("top_p", 8, False), ("top_p", 16, True), ("remoe", 16, True)):
        case = Case(router, num_experts)
        layer = case.layer()
        x_TD = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1))
        _, record = layer(x_TD, RouteContext(training=True, generator=torch.Generator(), sequence_length=NUM_TOKENS))
        assert record.routing.expert_N.numel() == NUM_TOKENS * num_experts
        assert (computed.pop() == int(record.load_E.sum())) is is_short


def test_what_a_router_chose_is_gathered_where_rerouting_reads_it(as_on_a_gpu: None) -> None:
    case = Case("top_p", 4)
    x_TD = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1))
    routing = case.router()(x_TD, RouteContext(training=True, generator=torch.Generator(), sequence_length=NUM_TOKENS))
    assert isinstance(routing, Routing)
    assert routing.chosen_N is not None
    span = Span(start=0, length=NUM_TOKENS, total=NUM_TOKENS, lengths=(NUM_TOKENS,))
    with_scores = BatchAssignments.gather(routing, span, SINGLE_RANK, with_scores=True).routing
    assert torch.equal(with_scores.choices_N, routing.chosen_N)
    assert torch.equal(with_scores.counted_N, routing.counted_N)
    assert BatchAssignments.gather(routing, span, SINGLE_RANK, with_scores=False).routing.chosen_N is None


def test_slices_of_a_rectangle_keep_what_was_chosen(as_on_a_gpu: None) -> None:
    case = Case("top_p", 4)
    x_TD = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1))
    context = RouteContext(training=True, generator=torch.Generator(), sequence_length=NUM_TOKENS)
    router = case.router()
    part, alone = router(x_TD, context).slice_tokens(8, 16), router(x_TD[8:24], context)
    assert part.top_k == alone.top_k == 4
    for name in ("token_N", "expert_N", "weight_N", "kept_N", "chosen_N"):
        torch.testing.assert_close(getattr(part, name), getattr(alone, name))
