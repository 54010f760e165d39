"""Losses and load metrics: values by hand, and invariances."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing import metrics
from moebench.routing.losses import compute_squared_variation, importance, load_balance, parameter_penalty, z
from moebench.routing.metrics import LoadCount
from moebench.routing.values import LayerRecord, Routing

EVERY_LOSS = (load_balance, parameter_penalty, z, importance)


def record_of(routing: Routing, kept: Routing | None = None, valid_T: Tensor | None = None) -> LayerRecord:
    return LayerRecord(routing=routing, kept=kept or routing, valid_T=valid_T)


def build_routing(expert_TK: list[list[int]], scores_TE: list[list[float]]) -> Routing:
    """Build a routing: weights are the scores of the chosen experts, logits their logarithms."""
    score_TE = torch.tensor(scores_TE)
    chosen_TK = torch.tensor(expert_TK)
    return Routing.from_top_k(
        chosen_TK,
        score_TE.gather(1, chosen_TK),
        num_experts=score_TE.shape[1],
        logits_TE=score_TE.log(),
        scores_TE=score_TE,
    )


def softmax_routing(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Routing:
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    scores_TE = logits_TE.softmax(-1)
    weight_TK, expert_TK = scores_TE.topk(top_k, dim=-1)
    return Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts, logits_TE=logits_TE, scores_TE=scores_TE)


@given(st.integers(1, 12), st.data())
def test_load_balance_is_1_at_uniform_for_every_k(num_experts: int, data) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    # Token t goes to experts t, t+1 ... t+k-1: E tokens load every expert k times.
    expert_TK = (torch.arange(num_experts).unsqueeze(1) + torch.arange(top_k)) % num_experts
    scores_TE = torch.full((num_experts, num_experts), 1 / num_experts)
    weight_TK = torch.full(expert_TK.shape, 1 / top_k)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts, scores_TE=scores_TE)
    assert load_balance(record_of(routing)).item() == pytest.approx(1, abs=1e-6)
    assert importance(record_of(routing)).item() == pytest.approx(0, abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 20), st.data())
def test_load_balance_is_e_over_k_at_collapse_on_k_experts(num_experts: int, num_tokens: int, data) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    scores_TE = torch.zeros(num_tokens, num_experts)
    scores_TE[:, :top_k] = 1 / top_k
    expert_TK = torch.arange(top_k).expand(num_tokens, -1)
    routing = Routing.from_top_k(expert_TK, scores_TE[:, :top_k], num_experts=num_experts, scores_TE=scores_TE)
    assert load_balance(record_of(routing)).item() == pytest.approx(num_experts / top_k, rel=1e-5)
    assert importance(record_of(routing)).item() == pytest.approx(num_experts / top_k - 1, rel=1e-5, abs=1e-6)
    assert metrics.max_violation(routing.load_E) == pytest.approx(num_experts / top_k - 1)


def test_load_balance_by_hand() -> None:
    # Two tokens, one to each expert: f = [.5, .5]. P = [(.7 + .5) / 2, (.3 + .5) / 2] = [.6, .4].
    # E · Σ f P = 2 · (.5 · .6 + .5 · .4) = 1.0
    record = record_of(build_routing([[0], [1]], [[0.7, 0.3], [0.5, 0.5]]))
    assert load_balance(record).item() == pytest.approx(1.0)
    # Three tokens, f = [2/3, 1/3], P = [.53, .99] / 3 ... = [1.03, 1.97] / 3: below 1 although unbalanced.
    # 2 · (2/3 · 1.03/3 + 1/3 · 1.97/3) = 8.06 / 9 = 0.8956
    record = record_of(build_routing([[0], [0], [1]], [[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]]))
    assert load_balance(record).item() == pytest.approx(8.06 / 9, abs=1e-6)


def test_parameter_penalty_by_hand() -> None:
    # Sizes 1 and 3 are 1/2 and 3/2 of their mean. Three tokens, two of them to the large expert: f = (1/3, 2/3),
    # P = (.4, .6): 2 · (1/2 · 1/3 · .4 + 3/2 · 2/3 · .6) = 4/3. With equal sizes 2 · (.4/3 + 1.2/3) = 16/15.
    record = record_of(build_routing([[0], [1], [1]], [[0.4, 0.6]] * 3))
    assert parameter_penalty(replace(record, flops_E=(100, 300))).item() == pytest.approx(4 / 3)
    assert parameter_penalty(replace(record, flops_E=(7, 7))).item() == pytest.approx(16 / 15)
    assert parameter_penalty(record).item() == pytest.approx(load_balance(record).item())
    # The same tokens on the small expert cost less; an expert without a network costs nothing.
    other = record_of(build_routing([[0], [0], [1]], [[0.6, 0.4]] * 3))
    assert parameter_penalty(replace(other, flops_E=(100, 300))).item() == pytest.approx(
        2 * (0.5 * 0.4 + 1.5 * 0.4 / 3)
    )
    assert parameter_penalty(replace(other, flops_E=(0, 300))).item() == pytest.approx(2 * (2 * 0.4 / 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_parameter_penalty_is_1_at_uniform_for_any_sizes(sizes: list[int]) -> None:
    scores_TE = torch.full((len(sizes), len(sizes)), 1 / len(sizes))
    routing = build_routing([[expert] for expert in range(len(sizes))], scores_TE.tolist())
    assert parameter_penalty(replace(record_of(routing), flops_E=tuple(sizes))).item() == pytest.approx(1, abs=1e-5)


def test_load_balance_counts_before_capacity() -> None:
    # f = [2/3, 1/3] before the drop and [1/2, 1/2] after it; P = [.6, .4]: 2 · (2/3 · .6 + 1/3 · .4) = 16/15.
    routing = build_routing([[0], [0], [1]], [[0.6, 0.4]] * 3)
    dropped = routing.keep(torch.tensor([True, False, True]))
    assert load_balance(record_of(routing, dropped)).item() == pytest.approx(16 / 15)
    assert importance(record_of(routing, dropped)) == importance(record_of(routing))


def test_load_balance_has_no_gradient_through_the_counts() -> None:
    # d/dp of E · Σ f P with f fixed is E · f_e / T for each token: f = [1, 0], T = 2 -> [1, 0].
    scores_TE = torch.tensor([[0.6, 0.4], [0.7, 0.3]], requires_grad=True)
    expert_TK = torch.zeros(2, 1, dtype=torch.int64)
    routing = Routing.from_top_k(expert_TK, scores_TE[:, :1], num_experts=2, scores_TE=scores_TE)
    (gradient_TE,) = torch.autograd.grad(load_balance(record_of(routing)), scores_TE)
    # The scores are normalised first, so the gradient lies in the simplex: [1, 0] minus its mean under p.
    expected_TE = torch.tensor([[1 - 0.6, -0.6], [1 - 0.7, -0.7]])
    torch.testing.assert_close(gradient_TE, expected_TE)


@given(st.integers(1, 16))
def test_z_at_zero_is_log_e_squared(num_experts: int) -> None:
    logits_TE = torch.zeros(3, num_experts)
    routing = replace(softmax_routing(3, num_experts, 1, 0), logits_TE=logits_TE)
    assert z(record_of(routing)).item() == pytest.approx(math.log(num_experts) ** 2, abs=1e-6)
    # It pulls the log-sum-exp, not each logit, to 0: at h = -ln E it is 0.
    routing = replace(routing, logits_TE=logits_TE - math.log(num_experts))
    assert z(record_of(routing)).item() == pytest.approx(0, abs=1e-6)


def test_gradient_of_z_is_twice_the_log_sum_exp_times_softmax() -> None:
    logits_TE = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    routing = replace(softmax_routing(1, 3, 1, 0), logits_TE=logits_TE)
    (gradient_TE,) = torch.autograd.grad(z(record_of(routing)), logits_TE)
    torch.testing.assert_close(gradient_TE, 2 * logits_TE.logsumexp(-1, keepdim=True) * logits_TE.softmax(-1))


def test_importance_by_hand() -> None:
    # Summed weights [3, 1]: mean 2, population variance 1, CV² = 1/4.
    assert compute_squared_variation(torch.tensor([3.0, 1.0])).item() == pytest.approx(0.25)
    record = record_of(build_routing([[0], [0], [1]], [[1.0, 1e-9], [1.0, 1e-9], [1e-9, 1.0]]))
    # Sums [2, 1]: mean 1.5, variance .25, CV² = .25 / 2.25 = 1/9.
    assert importance(record).item() == pytest.approx(1 / 9)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 4), st.data())
def test_losses_ignore_the_order_of_tokens_and_duplication(
    num_tokens: int, num_experts: int, copies: int, data
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 50))
    routing = softmax_routing(num_tokens, num_experts, top_k, seed)
    order = data.draw(st.permutations(range(num_tokens))) * copies
    assert routing.logits_TE is not None
    assert routing.scores_TE is not None
    other = Routing.from_top_k(
        routing.expert_N.view(-1, top_k)[order],
        routing.weight_N.view(-1, top_k)[order],
        num_experts=num_experts,
        logits_TE=routing.logits_TE[order],
        scores_TE=routing.scores_TE[order],
    )
    for loss in EVERY_LOSS:
        torch.testing.assert_close(loss(record_of(other)), loss(record_of(routing)), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 6))
def test_losses_ignore_padding(num_tokens: int, num_padding: int, num_experts: int) -> None:
    total = num_tokens + num_padding
    routing = softmax_routing(total, num_experts, 1, seed=total)
    valid_T = torch.arange(total) < num_tokens
    assert routing.logits_TE is not None
    assert routing.scores_TE is not None
    unpadded = replace(
        routing.keep(valid_T[routing.token_N]).compact(),
        num_tokens=num_tokens,
        logits_TE=routing.logits_TE[:num_tokens],
        scores_TE=routing.scores_TE[:num_tokens],
    )
    padded = record_of(routing.keep(valid_T[routing.token_N]), valid_T=valid_T)
    for loss in EVERY_LOSS:
        torch.testing.assert_close(loss(padded), loss(record_of(unpadded)))
    ours, theirs = LoadCount.from_record(padded), LoadCount.from_record(record_of(unpadded))
    assert (ours.num_tokens, ours.num_unserved) == (theirs.num_tokens, theirs.num_unserved)


def test_losses_without_scores_or_logits_are_refused() -> None:
    routing = Routing.from_top_k(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), num_experts=2)
    with pytest.raises(UsageError, match=r"router\.losses\.load_balance: this router has no scores"):
        load_balance(record_of(routing))
    with pytest.raises(UsageError, match=r"router\.losses\.z: this router has no logits"):
        z(record_of(routing))


@pytest.mark.parametrize(
    ("load", "violation", "cv", "entropy", "dead"),
    [
        ([5, 5, 5, 5], 0.0, 0.0, 1.0, 0),
        ([20, 0, 0, 0], 3.0, math.sqrt(3), 0.0, 3),  # E/k - 1 = 3; variance 75 over mean² 25
        ([10, 10, 0, 0], 1.0, 1.0, 0.5, 2),  # ln 2 / ln 4
        ([399, 1, 200, 200], 0.995, None, None, 1),  # 1 is below 1 % of the mean 200
        ([398, 2, 200, 200], 0.99, None, None, 0),  # exactly 1 % is not dead
        ([7], 0.0, 0.0, 1.0, 0),  # a single expert is balanced
        ([0, 0, 0], 0.0, 0.0, 1.0, 3),  # no tokens
    ],
)
def test_load_metrics_by_hand(load, violation, cv, entropy, dead) -> None:
    load_E = torch.tensor(load)
    assert metrics.max_violation(load_E) == pytest.approx(violation)
    assert metrics.count_dead_experts(load_E) == dead
    if cv is not None:
        assert metrics.coefficient_of_variation(load_E) == pytest.approx(cv)
        assert metrics.compute_normalised_entropy(load_E) == pytest.approx(entropy)


def count(load: list[int], *, dropped: int = 0, unserved: int = 0, tokens: int = 8, rerouted: int = 0) -> LoadCount:
    return LoadCount(
        load_E=torch.tensor(load),
        num_dropped=dropped,
        num_unserved=unserved,
        num_tokens=tokens,
        num_rerouted=rerouted,
    )


def test_load_metrics_are_averaged_over_layers() -> None:
    # Each layer collapsed on another expert: pooled, the loads would be even.
    summary = metrics.summarise_load([count([8, 0]), count([0, 8])])
    assert summary["load/max_violation"] == 1.0
    assert summary["load/entropy"] == 0.0
    assert summary["load/dead_experts"] == 1.0


def test_drop_reroute_and_unserved_rates_by_hand() -> None:
    # Layer 1: 2 of 8 assignments dropped, 1 of 8 tokens unserved; layer 2: none.
    summary = metrics.summarise_load([count([4, 4], dropped=2, unserved=1, rerouted=3), count([4, 4])])
    assert summary["load/drop_rate"] == pytest.approx((2 / 8 + 0) / 2)
    assert summary["load/reroute_rate"] == pytest.approx((3 / 8 + 0) / 2)
    assert summary["load/unserved"] == pytest.approx((1 / 8 + 0) / 2)
    assert metrics.summarise_load([]) == {}


def test_load_counts_add_up() -> None:
    first = count([1, 2], dropped=1, unserved=2, tokens=3, rerouted=4)
    total = first + count([3, 4], dropped=5, unserved=6, tokens=7, rerouted=8)
    assert total.load_E.tolist() == [4, 6]
    assert (total.num_dropped, total.num_unserved, total.num_tokens, total.num_rerouted) == (6, 8, 10, 12)


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 3))
def test_load_count_from_record(num_tokens: int, num_experts: int, slots: int) -> None:
    routing = softmax_routing(num_tokens, num_experts, 1, seed=num_tokens)
    slot_N = torch.tensor([int((routing.expert_N[:n] == e).sum()) for n, e in enumerate(routing.expert_N)])
    kept = routing.keep(slot_N < slots)
    load_count = LoadCount.from_record(record_of(routing, kept))
    assert int(load_count.load_E.sum()) == num_tokens
    assert load_count.num_dropped == load_count.num_unserved == int((routing.load_E - slots).clamp(min=0).sum())
