"""Selection and sort in Triton at the sizes of a large layer: torch's operators on the same device, and no wait for it.

MOEBENCH_TEST_DEVICE=cpu tries the tests on small sizes; with MOEBENCH_KERNELS=interpret they run the kernels.
"""

from typing import Any

import pytest
import torch
from support.device_values import distance, draw, no_wait
from torch import Tensor

from moebench.experts.dispatch import DispatchPlan
from moebench.routing.kernels import backend
from moebench.routing.sorting import sort_keys
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

BOUND = 2e-6
"""Norm of the difference to fp64 over the norm: rounding alone."""
RULES: list[dict[str, Any]] = [
    {},
    {"weights": "shares"},
    {"weights": "softmax"},
    {"score": "sigmoid", "weights": "shares", "ranks_scores": True},
]


@pytest.fixture(autouse=True)
def triton_is_used(device: torch.device) -> None:
    if device.type == "cuda":
        assert backend.uses_triton(torch.zeros(1, device=device)), "Triton is not installed, or compiles nothing"


def differentiate(logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None) -> tuple[Tensor, ...]:
    """Return what is chosen, and the gradient of the logits."""
    leaf_TE = logits_TE.detach().requires_grad_()
    expert_TK, weight_TK, scores_TE = choose_top_k(leaf_TE, rule, bias_E=bias_E)
    grads = [draw(*each.shape, device=each.device, dtype=each.dtype) for each in (weight_TK, scores_TE)]
    [grad_TE] = torch.autograd.grad([weight_TK, scores_TE], leaf_TE, grads)
    return expert_TK, weight_TK.detach(), scores_TE.detach(), grad_TE


@pytest.mark.parametrize("num_experts", [64, 6, 100, 1000])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_the_kernel_chooses_what_torch_chooses(
    options: dict[str, Any], num_experts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = 16384 if device.type == "cuda" else 21
    rule = TopKRule(top_k=min(8, num_experts), **options)
    logits_TE = draw(num_tokens, num_experts, device=device)
    logits_TE[: num_tokens // 2] = (logits_TE[: num_tokens // 2] * 4).round() / 4  # many ties
    if rule.score == "softmax":
        logits_TE[:, num_experts // 2 :: 7] = -torch.inf  # masked experts
        logits_TE[:, : rule.top_k] = logits_TE[:, : rule.top_k].clamp(min=-9.0)
    bias_E = draw(num_experts, device=device) / 8 if rule.ranks_scores else None
    with no_wait(device):
        first = differentiate(logits_TE, rule, bias_E)
    again = differentiate(logits_TE, rule, bias_E)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setenv(backend.VARIABLE, "torch")
    same_T = (first[0] == differentiate(logits_TE, rule, bias_E)[0]).all(-1)
    # Of scores that are rounded in the last bits, a few are on the other side of a boundary of a quantum.
    assert same_T.all() or (rule.ranks_scores and same_T.double().mean() > 0.99)
    exact = differentiate(logits_TE[same_T].double(), rule, None if bias_E is None else bias_E.double())
    agrees_T = (first[0][same_T] == exact[0]).all(-1)
    assert agrees_T.double().mean() > 0.99
    for value, expected in zip(first[1:3], exact[1:3], strict=True):
        assert distance(value[same_T][agrees_T], expected[agrees_T]) < BOUND
    if same_T.all() and agrees_T.all():  # else the gradients that are drawn belong to other tokens
        assert distance(first[3], exact[3]) < BOUND


@pytest.mark.parametrize("load", ["random", "hot", "holes"])
@pytest.mark.parametrize("num_experts", [1, 64, 300])
def test_the_sort_is_stable(num_experts: int, load: str, device: torch.device) -> None:
    num = 131_072 + 5 if device.type == "cuda" else 300
    key_N = torch.randint(num_experts, (num,), device=device, generator=torch.Generator(device).manual_seed(0))
    draw_N = draw(num, device=device)
    if load == "hot":
        key_N[draw_N < 1.0] = num_experts - 1
    kept_N = draw_N > -0.5 if load == "holes" else None
    like = torch.zeros(1, device=device)
    with no_wait(device):
        ours = sort_keys(key_N, kept_N, num_experts, like=like)
    counted_N = key_N if kept_N is None else key_N.where(kept_N, num_experts)
    assert torch.equal(ours.index_N, counted_N.sort(stable=True).indices)
    if device.type == "cuda":
        assert ours.place_N is not None
        assert ours.count_Q is not None
        assert torch.equal(ours.place_N[ours.index_N], torch.arange(num, device=device))
        assert torch.equal(ours.count_Q, counted_N.bincount(minlength=num_experts + 1)[:num_experts])
        assert ours.count_Q.dtype == torch.int64


def test_plans_are_those_of_torch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens = 4096 if device.type == "cuda" else 30
    rule, logits_TE = TopKRule(top_k=3), draw(num_tokens, 16, device=device)
    for holes in (False, True):
        plans, loads = [], []
        for choice in (None, "torch"):
            if choice is not None:
                monkeypatch.setenv(backend.VARIABLE, choice)
            expert_TK, weight_TK, _ = choose_top_k(logits_TE, rule)
            routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=16)
            if holes:
                routing = routing.keep(draw(len(routing.token_N), device=device) > 0.0)
            with no_wait(device):
                plans.append(DispatchPlan.of(routing))
            loads.append(routing.load_E)
            counted_N = routing.counted_N
        monkeypatch.undo()
        ours, theirs = plans
        assert torch.equal(*loads)
        for name in ("order_N", "assignment_R", "token_R"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.row_N[counted_N], theirs.row_N[counted_N])
        num_kept = int(loads[0].sum())
        row_M, expected_M = (plan.token_rows.row_M.flatten()[:num_kept] for plan in plans)
        assert torch.equal(row_M, expected_M)
