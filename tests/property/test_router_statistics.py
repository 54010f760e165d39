"""Statistics of random routers and initial weights, on seeded samples with five-sigma bands."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.routing.context import DataSummary, RouteContext
from moebench.routing.gate import TRUNCATED_STD, Gate, jitter
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.routers.gshard import GShard, STMoE
from moebench.routing.routers.hash import build_balanced_table
from moebench.routing.routers.noisy_top_k import estimate_smooth_load
from moebench.routing.routers.random import Random
from moebench.routing.values import Routing
from moebench.seeds import derive_seed, make_generator

SIGMAS = 5


def context(seed: int = 0, *, training: bool = True) -> RouteContext:
    return RouteContext(training=training, generator=torch.Generator().manual_seed(seed), sequence_length=1)


def sample_noisy_logits(num_tokens: int, num_experts: int, std: float, *, same: bool) -> tuple[torch.Tensor, ...]:
    """Return clean logits (equal for all tokens, or not), noisy logits and the standard deviations of the noise."""
    generator = torch.Generator().manual_seed(0)
    clean_TE = torch.randn(1 if same else num_tokens, num_experts, generator=generator).expand(num_tokens, -1)
    noisy_TE = clean_TE + std * torch.randn(num_tokens, num_experts, generator=generator)
    return clean_TE, noisy_TE, torch.full_like(clean_TE, std)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smooth_load_sums_to_k_for_each_token(top_k: int) -> None:
    # E[Σ_e P_e] = k exactly; V-MoE's approximation (the k-th best for all) would give 1.64 at k = 2.
    num_tokens = 20_000
    clean_TE, noisy_TE, std_TE = sample_noisy_logits(num_tokens, 5, 0.8, same=False)
    mean = estimate_smooth_load(clean_TE, noisy_TE, std_TE, top_k, None).sum().item() / num_tokens
    assert mean == pytest.approx(top_k, abs=SIGMAS / math.sqrt(num_tokens))  # one token's sum has deviation < 1


def test_smooth_load_is_the_selection_probability() -> None:
    num_tokens = 20_000
    clean_TE, noisy_TE, std_TE = sample_noisy_logits(num_tokens, 5, 0.8, same=True)
    expected_E = estimate_smooth_load(clean_TE, noisy_TE, std_TE, 2, None) / num_tokens
    chosen_TK = noisy_TE.topk(2, dim=-1).indices
    share_E = torch.bincount(chosen_TK.reshape(-1), minlength=5) / num_tokens
    assert (expected_E - share_E).abs().max() < SIGMAS * math.sqrt(0.5 / num_tokens)


def test_smooth_load_is_t_at_k_equal_e() -> None:
    clean_TE, noisy_TE, std_TE = sample_noisy_logits(7, 3, 0.5, same=False)
    assert estimate_smooth_load(clean_TE, noisy_TE, std_TE, 3, None).tolist() == [7.0, 7.0, 7.0]
    valid_T = torch.arange(7) < 4
    assert estimate_smooth_load(clean_TE, noisy_TE, std_TE, 3, valid_T).tolist() == [4.0, 4.0, 4.0]


def build_gshard(logit: float, threshold: float) -> GShard:
    """Build a router of two experts with p = softmax([logit, 0]) for the token [1]."""
    router = GShard(GShard.Config(threshold=threshold), RouterBuildContext(d_model=1, num_experts=2))
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.tensor([[logit], [0.0]]))
    return router


@pytest.mark.parametrize(("logit", "threshold"), [(3.0, 0.2), (1.0, 0.5), (1.0, 0.2), (5.0, 1.0)])
def test_second_expert_is_kept_with_probability_proportional_to_its_weight(logit: float, threshold: float) -> None:
    num_tokens = 10_000
    second = 1 / (1 + math.exp(logit))  # p_2 = g_2: two experts, so the weights are the probabilities
    probability = min(1.0, second / threshold)
    routing = build_gshard(logit, threshold)(torch.ones(num_tokens, 1), context())
    assert routing.load_E[0] == num_tokens
    deviation = math.sqrt(num_tokens * probability * (1 - probability))
    assert abs(int(routing.load_E[1]) - num_tokens * probability) <= SIGMAS * deviation + 1e-9
    # Weights are normalised before the drop: a remaining first expert does not get weight 1.
    torch.testing.assert_close(routing.weight_N[routing.expert_N == 0], torch.full((num_tokens,), 1 - second))


@pytest.mark.parametrize(("second", "gshard_share", "st_moe_share"), [(0.1, 0.2, 0.5), (0.3, 0.6, 1), (0.4, 0.8, 1)])
def test_default_thresholds_of_gshard_and_st_moe(second: float, gshard_share: float, st_moe_share: float) -> None:
    # min(1, 2 g_2) in the paper's algorithm 1, min(1, 5 g_2) in mesh-TensorFlow.
    for router_class, share in ((GShard, gshard_share), (STMoE, st_moe_share)):
        router = router_class(router_class.Config(), RouterBuildContext(d_model=1, num_experts=2))
        with torch.no_grad():
            router.gate.weight_ED.copy_(torch.tensor([[math.log(1 / second - 1)], [0.0]]))
        load_E = router(torch.ones(10_000, 1), context()).load_E
        assert abs(int(load_E[1]) - 10_000 * share) <= SIGMAS * 100 * math.sqrt(share * (1 - share))


def test_gshard_keeps_both_experts_in_evaluation() -> None:
    routing = build_gshard(5.0, 1.0)(torch.ones(1000, 1), context(training=False))
    assert routing.load_E.tolist() == [1000, 1000]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_balanced_table_is_even(counts: list[int], num_experts: int) -> None:
    count_V = torch.tensor(counts)
    table_V = build_balanced_table(count_V, num_experts)
    assert torch.equal(table_V, build_balanced_table(count_V, num_experts))
    assert table_V.dtype == torch.int64
    assert 0 <= int(table_V.min()) <= int(table_V.max()) < num_experts
    load_E = torch.zeros(num_experts, dtype=torch.int64).index_add(0, table_V, count_V)
    # Greedy: the most loaded expert was the least loaded before its last id, so the difference is at most that id.
    assert load_E.max() - load_E.min() <= max(counts)
    assert load_E.max() <= sum(counts) / num_experts + max(counts)
    used = min(num_experts, sum(count > 0 for count in counts))
    assert (load_E > 0).sum() >= used


def test_balanced_table_by_hand() -> None:
    # 9 -> expert 0; 5 -> 1; 4 -> 1 (9); 3 ties at 9, 9 -> 0 (12); ids 2 and 5, which never occur, go to the expert
    # with the smaller load, 1.
    assert build_balanced_table(torch.tensor([9, 5, 0, 4, 3, 0]), 2).tolist() == [0, 1, 1, 1, 0, 1]


def test_unseen_ids_are_spread() -> None:
    table_V = build_balanced_table(torch.tensor([0] * 12), 4)
    assert torch.bincount(table_V).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("top_k", [1, 3])
def test_random_draws_are_uniform(top_k: int) -> None:
    router = Random(Random.Config(top_k=top_k), RouterBuildContext(d_model=4, num_experts=8))
    num_tokens, probability = 16_000, top_k / 8
    load_E = router(torch.zeros(num_tokens, 4), context()).load_E
    deviation = math.sqrt(num_tokens * probability * (1 - probability))
    assert (load_E - num_tokens * probability).abs().max() < SIGMAS * deviation


def test_jitter_is_bounded_with_mean_1() -> None:
    x_TD = torch.ones(100, 100)
    y_TD = jitter(x_TD, 0.25, context())
    assert 0.75 <= y_TD.min() < 0.76
    assert 1.24 < y_TD.max() <= 1.25
    assert y_TD.mean().item() == pytest.approx(1, abs=SIGMAS * 0.25 / math.sqrt(3) / 100)
    assert jitter(x_TD, 0.0, context()) is x_TD


def test_initial_weights_of_the_gate_are_truncated() -> None:
    gate = Gate(64, 128)
    gate.init_weights(torch.Generator().manual_seed(0))
    std = math.sqrt(0.1 / 64)
    assert gate.weight_ED.abs().max() <= 2 * std
    # A normal distribution truncated at two standard deviations has 0.8796 of its standard deviation.
    assert pytest.approx(0.8796, abs=1e-4) == TRUNCATED_STD
    assert gate.weight_ED.std().item() == pytest.approx(0.8796 * std, rel=0.03)
    x_TD = torch.nn.functional.rms_norm(torch.randn(256, 64, generator=torch.Generator().manual_seed(1)), (64,))
    assert gate.initial_logit_std == pytest.approx(0.8796 * math.sqrt(0.1), rel=1e-4)
    assert gate(x_TD).std().item() == pytest.approx(gate.initial_logit_std, rel=0.03)


@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4), st.integers(0, 9))
def test_seed_depends_on_its_parts(parts: list[object], other: int) -> None:
    seed = derive_seed(*parts)
    assert seed == derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed != derive_seed(*parts, other)
    draws = [torch.rand(3, generator=make_generator(*parts)) for _ in range(2)]
    assert torch.equal(*draws)


def test_seed_separates_parts_and_types() -> None:
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)


def test_hash_depends_on_the_token_id_only() -> None:
    count_V = torch.arange(30, 0, -1)
    router = ROUTERS.get("hash").item(
        ROUTERS.get("hash").item.Config(),
        RouterBuildContext(d_model=4, num_experts=4, data=DataSummary(token_count_V=count_V)),
    )
    token_id_T = torch.tensor([3, 7, 3, 29, 7])
    x_TD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ctx = RouteContext(training=True, generator=torch.Generator(), sequence_length=5, token_id_T=token_id_T)
    routing: Routing = router(x_TD, ctx)
    assert torch.equal(routing.expert_N, build_balanced_table(count_V, 4)[token_id_T])
    assert torch.equal(router(2 * x_TD, ctx).expert_N, routing.expert_N)
    assert (routing.weight_N == 1).all()
