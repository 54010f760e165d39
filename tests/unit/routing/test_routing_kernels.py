"""Selection and sort in Triton, run by its interpreter on the CPU, against torch's operators."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.case_selection import combine_axes
from support.routing_strategies import crowded_routings, rectangles, routings
from torch import Tensor

from moebench.experts import dispatch as dispatch_module
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.kernels.groups import Groups
from moebench.routing import values
from moebench.routing.context import RouteContext
from moebench.routing.kernels import backend
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.sorting import MAX_KEYS, sort_keys
from moebench.routing.token_choice import SMALLEST_SUM, TopKRule, choose_top_k
from moebench.routing.values import Routing

pytest.importorskip("triton")

RULES = [
    {},
    {"weights": "shares"},
    {"weights": "softmax"},
    {"score": "sigmoid"},
    {"score": "sigmoid", "weights": "shares"},
    {"score": "sigmoid", "weights": "softmax"},
    {"score": "sigmoid", "weights": "shares", "ranks_scores": True},
    {"ranks_scores": True},
]
SHAPES = [(1, 1, 1), (5, 1, 1), (33, 3, 2), (130, 6, 6), (7, 64, 8), (3, 130, 5)]
"""Tokens, experts and experts per token: none fills a tile, and the fourth needs two."""
QUICK_PAIRS = [(rule, SHAPES[2]) for rule in RULES]
QUICK_PAIRS += [(RULES[rule], SHAPES[shape]) for rule, shape in ((0, 0), (4, 1), (1, 3), (2, 4), (5, 5))]
"""Each rule and each shape."""
QUICK_USES = [(rule, "both") for rule in RULES] + [(RULES[4], "weights"), (RULES[4], "scores")]
SORT_AXES = (["random", "hot", "idle"], [1, 3, 64, 257], [0, 1, 127, 128, 129, 515])
QUICK_SORTS: list[tuple[Any, ...]] = [
    *[("random", 64, 0), ("random", 3, 127), ("random", 1, 128), ("random", 64, 129), ("random", 257, 515)],
    *[("hot", 3, 1), ("hot", 257, 129), ("hot", 64, 515)],
    *[("idle", 257, 0), ("idle", 1, 127), ("idle", 64, 129), ("idle", 3, 515)],
]
"""Each number of keys and each length, with and without a hot expert and with experts that get nothing."""


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("where there is a GPU, tests/gpu/test_gpu_routing_kernels.py runs the kernels")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(backend.VARIABLE, "interpret")
        yield


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def choose_both(logits_TE: Tensor, rule: TopKRule, **options: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what the kernel chooses, and what torch's operators choose."""
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for choice in ("interpret", "torch"):
            monkeypatch.setenv(backend.VARIABLE, choice)
            results.append(choose_top_k(logits_TE, rule, **options))
    return results


def assert_same_choice(logits_TE: Tensor, rule: TopKRule, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    ours, theirs = choose_both(logits_TE, rule, **options)
    assert torch.equal(ours[0], theirs[0])
    for value, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-7)
    return ours


@pytest.mark.parametrize(("options", "shape"), combine_axes(RULES, SHAPES, quick=QUICK_PAIRS), ids=str)
def test_the_kernel_chooses_what_torch_chooses(options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    num_tokens, num_experts, top_k = shape
    rule, logits_TE = TopKRule(top_k=top_k, **options), 2 * draw(num_tokens, num_experts)
    assert_same_choice(logits_TE, rule)
    assert_same_choice(logits_TE, rule, bias_E=0.3 * draw(num_experts))
    assert_same_choice(logits_TE, rule, ranked_TE=draw(num_tokens, num_experts + 1)[:, :num_experts])  # strided
    ties_TE = (logits_TE * 2).round() / 2
    expert_TK, *_ = assert_same_choice(ties_TE, rule)
    chosen_TK = ties_TE.gather(1, expert_TK)
    is_tie_TJ = chosen_TK.diff(dim=1) == 0
    assert (expert_TK.diff(dim=1)[is_tie_TJ] > 0).all()  # to the lower index
    assert is_tie_TJ.any() or top_k == 1


def test_numbers_by_hand() -> None:
    logits_TE = torch.tensor([[0.0, 2.0, 2.0, 1.0]])  # e^0 + 2 e^2 + e^1 = 18.4964
    rule = TopKRule(top_k=3, weights="shares")
    expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule)
    assert expert_TK.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(scores_TE, torch.tensor([[0.0540645, 0.3994873, 0.3994873, 0.1469607]]))
    torch.testing.assert_close(weight_TK, torch.tensor([[0.4223188, 0.4223188, 0.1553624]]))  # e^2 / (2 e^2 + e)


@pytest.mark.parametrize("noise", [1e-7, 3e-5, 1e-3])
def test_near_ties_are_those_of_the_ranking(noise: float) -> None:
    """Values on both sides of the boundaries of a quantum: half of an even multiple rounds down, of an odd one up."""
    boundary_TE = (torch.arange(40).view(2, 20).float() % 7 - 3.5) * 2**-14
    for logits_TE in (boundary_TE, 1 + noise * draw(6, 20), -5 + noise * draw(6, 20)):
        assert_same_choice(logits_TE, TopKRule(top_k=5))


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # numpy, in the interpreter
def test_masked_experts_and_extreme_logits() -> None:
    logits_TE = draw(6, 7)
    logits_TE[0, 2:] = -torch.inf
    logits_TE[1, 1:] = -torch.inf  # the second choice is the first of those that are masked
    logits_TE[2] = torch.tensor([-1e-9, 0.0, -0.0, 1e-9, -1.0, -2.0, 1e-38])  # all but two are equal
    logits_TE[3] = torch.tensor([1e30, -1e30, 3e38, 1e20, 2.0**23, 2.0**24, -(2.0**40)])
    logits_TE[4] *= 100
    logits_TE[5] = 2.0**-14 * torch.tensor([2.0**22, 2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23, 2.0**23 + 1, 0.0, 3.0])
    for options in ({}, {"weights": "shares"}, {"score": "sigmoid"}):
        expert_TK, weight_TK, _ = assert_same_choice(logits_TE, TopKRule(top_k=2, **options))
        assert weight_TK.isfinite().all()
        assert expert_TK[1].tolist() == [0, 1]
    assert_same_choice(logits_TE[[0, 2, 3, 4, 5]], TopKRule(top_k=2, weights="softmax"))
    # Not a number, as in a training that has diverged: any experts, but two different ones that exist.
    broken_TE = logits_TE.clone()
    broken_TE[0], broken_TE[1, 3], broken_TE[2, :2] = torch.nan, torch.nan, torch.inf
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
        expert_TK, *_ = choose_top_k(broken_TE[:2], TopKRule(top_k=2, score="sigmoid"))
    assert ((expert_TK >= 0) & (expert_TK < 7)).all()
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "uses"), combine_axes(RULES, ["weights", "scores", "both"], quick=QUICK_USES), ids=str
)
def test_gradients_are_those_of_torch_in_fp64(options: dict[str, Any], uses: str) -> None:
    for num_tokens, num_experts, top_k in [(1, 1, 1), (9, 5, 5), (35, 6, 2), (3, 130, 4)]:
        rule, bias_E = TopKRule(top_k=top_k, **options), 0.1 * draw(num_experts)
        logits_TE = draw(num_tokens, num_experts).requires_grad_()
        exact_TE = logits_TE.detach().double().requires_grad_()
        gradients = []
        for leaf_TE in (logits_TE, exact_TE):  # fp64 is computed by torch's operators
            expert_TK, weight_TK, scores_TE = choose_top_k(leaf_TE, rule, bias_E=bias_E.to(leaf_TE.dtype))
            assert not expert_TK.requires_grad
            grad_TK, grad_TE = draw(num_tokens, top_k), draw(num_tokens, num_experts)
            total = (weight_TK * grad_TK).sum() if uses != "scores" else 0.0
            total = total + (scores_TE * grad_TE).sum() if uses != "weights" else total
            gradients.append(torch.autograd.grad(total, leaf_TE)[0])
        torch.testing.assert_close(*gradients, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_shares_of_scores_that_are_almost_zero() -> None:
    logits_TE = torch.tensor([[-50.0, -51.0, -52.0], [-45.0, -44.0, -80.0]], requires_grad=True)
    rule = TopKRule(top_k=2, score="sigmoid", weights="shares")
    ours, theirs = choose_both(logits_TE, rule)
    assert ours[1][0].sum() < 0.1  # the sum, 2.7e-22, is below SMALLEST_SUM
    assert ours[2][0].sum() < SMALLEST_SUM < ours[2][1].sum()
    gradients = [
        torch.autograd.grad((weight_TK * draw(2, 2)).sum(), logits_TE)[0] for _, weight_TK, _ in (ours, theirs)
    ]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_no_tokens_and_no_gradient() -> None:
    logits_TE = torch.zeros(0, 4, requires_grad=True)
    expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=2))
    assert (expert_TK.shape, weight_TK.shape, scores_TE.shape) == ((0, 2), (0, 2), (0, 4))
    assert torch.autograd.grad(weight_TK.sum(), logits_TE)[0].shape == (0, 4)
    assert not any(each.requires_grad for each in choose_top_k(draw(3, 4), TopKRule(top_k=2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions_stay_with_the_operators(dtype: torch.dtype) -> None:
    ours, theirs = choose_both(draw(9, 5).to(dtype), TopKRule(top_k=2, weights="shares"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[1].dtype == ours[2].dtype == dtype


@pytest.mark.parametrize(("load", "num_keys", "num"), combine_axes(*SORT_AXES, quick=QUICK_SORTS))
def test_the_counting_sort_is_a_stable_sort(load: str, num_keys: int, num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    key_N = torch.randint(num_keys, (num,), generator=generator)
    if load == "hot":
        key_N[torch.rand(num, generator=generator) < 0.9] = num_keys // 2
    elif load == "idle":
        key_N = key_N // 2 * 2 % num_keys
    for kept_N in (None, torch.rand(num, generator=generator) < 0.7, torch.zeros(num, dtype=torch.bool)):
        ours = sort_keys(key_N, kept_N, num_keys, like=torch.zeros(1))
        counted_N = key_N if kept_N is None else key_N.where(kept_N, num_keys)
        assert torch.equal(ours.index_N, counted_N.sort(stable=True).indices)
        assert torch.equal(ours.count_Q, counted_N.bincount(minlength=num_keys + 1)[:num_keys])
        assert torch.equal(ours.place_N[ours.index_N], torch.arange(num))


def test_many_keys_and_fp64_are_sorted_by_torch() -> None:
    key_N = torch.tensor([MAX_KEYS, 3, 0])
    for num_keys, like in ((MAX_KEYS + 1, torch.zeros(1)), (4, torch.zeros(1).double())):
        by_key = sort_keys(key_N.clamp(max=num_keys - 1), None, num_keys, like=like)
        assert by_key.index_N.tolist() == ([2, 1, 0] if num_keys > MAX_KEYS else [2, 0, 1])
        assert by_key.place_N is None
        assert by_key.count_Q is None


few = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
any_routing = st.one_of(crowded_routings, routings(holes=True), rectangles(holes=True))


def group_rows_as_on_a_gpu(load_E: Tensor, *, pad_for: torch.dtype | None = None) -> Groups:
    """Return groups whose loads only the device knows."""
    return Groups(load_E=load_E, offset_E=load_E.cumsum(0, dtype=torch.int32), loads=None, capacity=None)


@few
@given(any_routing, st.booleans())
def test_plans_are_those_of_torch(routing: Routing, on_gpu: bool) -> None:
    plans = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        if on_gpu:
            monkeypatch.setattr(dispatch_module, "group_rows", group_rows_as_on_a_gpu)
        for choice in ("interpret", "torch"):
            monkeypatch.setenv(backend.VARIABLE, choice)
            routing._counts.clear()
            plans.append(DispatchPlan.of(routing))
        ours, theirs = plans
        for name in ("order_N", "assignment_R", "token_R"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.row_N[routing.counted_N], theirs.row_N[routing.counted_N])
        assert torch.equal(ours.groups.load_E, theirs.groups.load_E)
        x_TD, kept = draw(routing.num_tokens, 3), routing.weight_N.where(routing.counted_N, 0.0)
        expected_TD = torch.zeros_like(x_TD).index_add(0, routing.token_N, kept.unsqueeze(1) * x_TD[routing.token_N])
        for plan in plans:
            torch.testing.assert_close(combine(dispatch(x_TD, plan), routing.weight_N, plan), expected_TD)


def test_the_load_is_counted_by_the_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("counted again")

    monkeypatch.setattr(values, "count_keys", refuse)
    routing = Routing.from_top_k(torch.tensor([[0, 2], [2, 1], [2, 0]]), torch.rand(3, 2), num_experts=4)
    plan = DispatchPlan.of(routing)
    assert plan.groups.load_E is routing.load_E
    assert routing.load_E.tolist() == [2, 1, 3, 0]


ROUTER_OPTIONS: list[tuple[str, dict[str, Any], int]] = [
    ("top_k", {}, 1),
    ("mixtral", {}, 1),
    ("olmoe", {"top_k": 3}, 1),
    ("switch", {"exploration": "sample"}, 1),
    ("x_moe", {}, 1),
    ("autonomy_of_experts", {}, 1),
    ("mlp_top_k", {}, 1),
    ("v_moe", {}, 1),
    ("noisy_top_k", {}, 1),
    ("null_experts", {}, 1),
    ("sinkhorn", {}, 1),
    ("deepseek_moe", {"top_k": 2}, 1),
    ("deepseek_moe", {"top_k": 2, "num_groups": 3, "kept_groups": 2}, 0),  # groups are left to the operators
    ("loss_free", {"renormalise": True}, 1),
    ("deepseek_v3", {"top_k": 2, "num_groups": 3, "kept_groups": 2}, 0),
    ("quantile_balancing", {}, 1),
]


@pytest.mark.parametrize(("name", "options", "calls"), ROUTER_OPTIONS, ids=str)
def test_routers_use_the_kernel(
    name: str, options: dict[str, Any], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moebench.routing.kernels.gpu import top_k

    chosen, choose = [], top_k.choose
    monkeypatch.setattr(top_k, "choose", lambda *arguments: chosen.append(arguments) or choose(*arguments))
    item = ROUTERS.get(name).item
    router = item(item.Config(**options), RouterBuildContext(d_model=8, num_experts=6))
    with torch.no_grad():
        for index, tensor in enumerate([*router.parameters(), *router.buffers()]):
            tensor.copy_(draw(index + 1, *tensor.shape)[0] / 4)
    x_TD, results = draw(21, 8), []
    for choice in ("interpret", "torch"):
        monkeypatch.setenv(backend.VARIABLE, choice)
        context = RouteContext(training=True, generator=torch.Generator().manual_seed(0), sequence_length=21)
        routing = router(x_TD, context)
        total = (routing.weight_N * draw(routing.weight_N.numel())).sum() + routing.scores_TE.square().sum()
        gradients = torch.autograd.grad(total, [*router.parameters()], allow_unused=True)
        results.append((routing, [each for each in gradients if each is not None]))
    assert len(chosen) == calls
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.equal(ours.expert_N, theirs.expert_N)
    torch.testing.assert_close(ours.weight_N, theirs.weight_N)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-5)
