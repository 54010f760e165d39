"""Static routers in grouped layouts: all experts are used, and parallel groups differ."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import Case, Tokens, build_context, randomise_parameters, route, tabulate_weights
from support.router_options import OPTIONS
from torch import Tensor

from moebench.routing.composite import GroupedRouter
from moebench.routing.context import RouteContext
from moebench.routing.features.padding_mask import PaddingMask
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.features.token_pairs import TokenPairs
from moebench.routing.level import Level
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.routers.hash import build_balanced_table
from moebench.routing.values import Routing

LENGTH, NUM_SEQUENCES, NUM_EXPERTS, VOCAB = 64, 64, 16, 200
FIXED = ("hash", "hash_bigram", "hash_position", "hash_future", "oracle", "domain", "domain_posterior")
"""Routers that are a fixed function of the token's context, without parameters."""


def static_cases() -> list[Case]:
    """Return every router that is static or has no learned parameters, with all its options."""
    cases = []
    for entry in ROUTERS.entries():
        if entry.item.form.is_dense or (entry.facts.learned and entry.facts.family != "static"):
            continue
        cases += [Case(entry.name, NUM_EXPERTS, options) for options in ({}, *OPTIONS.get(entry.name, []))]
    return cases


every_static_case = pytest.mark.parametrize("case", static_cases(), ids=str)
every_fixed_case = pytest.mark.parametrize("case", [c for c in static_cases() if c.name in FIXED], ids=str)


def build_large_context(num_experts: int = NUM_EXPERTS) -> RouterBuildContext:
    """Return the build context of a model with 200 token ids and 64 domains."""
    return replace(
        build_context(
            num_experts,
            vocab_size=VOCAB,
            token_count_V=(10_000 / torch.arange(1, VOCAB + 1)).long(),
            num_domains=NUM_SEQUENCES,
            sequence_length=LENGTH,
        ),
        features={TokenPairs: torch.randint(100, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0))},
    )


def build_grouped(case: Case, groups: int, *, pick_groups: bool) -> Any:
    return randomise_parameters(
        GroupedRouter(case.router_class, case.config, build_large_context(), groups, pick_groups=pick_groups)
    )


def context(seed: int = 0, *, training: bool = True, valid_T: Tensor | None = None) -> RouteContext:
    """Return the context of 4096 tokens with 200 ids, 16 labels and one domain for each of 64 sequences."""
    base = Tokens.draw(LENGTH * NUM_SEQUENCES, length=LENGTH).context(training=training, seed=seed)
    domain_T = torch.arange(NUM_SEQUENCES).repeat_interleave(LENGTH)
    return replace(
        base,
        token_id_T=torch.randint(VOCAB, domain_T.shape, generator=torch.Generator().manual_seed(1)),
        domain_T=domain_T,
        features={TokenLabels: torch.arange(len(domain_T)) // 3 % 16}
        | ({} if valid_T is None else {PaddingMask: valid_T}),
        valid_T=valid_T,
    )


def route_all(router: Any, ctx: RouteContext) -> Routing:
    return router(Tokens.draw(LENGTH * NUM_SEQUENCES, length=LENGTH).x_TD, ctx)


def sum_load_over_steps(router: Any) -> Tensor:
    """Return the load of the first steps after which every expert has tokens, or of 100.

    Some routers draw one expert for a whole batch.
    """
    load_E = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    for seed in range(100):
        load_E += route_all(router, context(seed)).load_E
        if (load_E > 0).all():
            break
    return load_E


@every_static_case
def test_two_levels_use_every_expert(case: Case) -> None:
    load_E = sum_load_over_steps(build_grouped(case, 4, pick_groups=True))
    assert (load_E > 0).all(), load_E.tolist()
    if case.facts.balanced and not case.options:
        assert load_E.min() == load_E.max(), load_E.tolist()


@every_fixed_case
def test_fixed_routers_on_two_levels_equal_one_level(case: Case) -> None:
    flat = randomise_parameters(case.router_class(case.config, build_large_context()))
    valid_T = torch.arange(LENGTH * NUM_SEQUENCES) % LENGTH < 50
    for padding in (None, valid_T):
        ctx = context(valid_T=padding)
        one, two = route_all(flat, ctx), route_all(build_grouped(case, 4, pick_groups=True), ctx)
        keep = slice(None) if padding is None else padding
        assert torch.equal(tabulate_weights(one)[keep], tabulate_weights(two)[keep])


def test_hash_position_on_two_levels_has_even_loads() -> None:
    assert route_all(build_grouped(Case("hash_position"), 4, pick_groups=True), context()).load_E.tolist() == [256] * 16


@pytest.mark.parametrize("evaluation", ["label", "prior"])
def test_domain_prior_on_two_levels_equals_one_level(evaluation: str) -> None:
    case = Case("domain", NUM_EXPERTS, {"evaluation": evaluation})
    flat, two_level = case.router_class(case.config, build_large_context()), build_grouped(case, 4, pick_groups=True)
    load_E = torch.arange(16)  # expert 0 has never seen a token
    flat.after_step(load_E, {})
    two_level.after_step(load_E, {})
    ctx = context(training=False)
    assert ctx.domain_T is not None
    ctx = replace(ctx, domain_T=ctx.domain_T + 32)  # half of them are held out
    torch.testing.assert_close(tabulate_weights(route_all(two_level, ctx)), tabulate_weights(route_all(flat, ctx)))


def find_pairs(router: Any) -> Tensor:
    """Return which pairs of experts of two groups share a token, bool [8, 8]."""
    table_TE = tabulate_weights(route_all(router, context())) > 0
    first_TE, second_TE = table_TE.float().split(NUM_EXPERTS // 2, dim=-1)
    return first_TE.T @ second_TE > 0


@every_static_case
def test_parallel_groups_use_different_tables(case: Case) -> None:
    if case.options.get("training", "batch") == "batch" and case.name == "thor":
        return  # one expert of each group for the whole batch
    num_pairs = int(find_pairs(build_grouped(case, 2, pick_groups=False)).sum())
    # Equal tables give 8 pairs. At random, 200 ids fill 61 of 64 pairs, 64 domains with two experts each at least 24.
    assert num_pairs > 24 or (case.name == "oracle" and num_pairs == 16), num_pairs


@pytest.mark.parametrize(
    ("name", "num_pairs"), [("hash_position", 64), ("hash_bigram", 64), ("oracle", 16), ("domain", 64)]
)
def test_number_of_pairs_of_two_groups(name: str, num_pairs: int) -> None:
    # 64 positions or domains and 16 labels have one pair each; 2500 pairs of ids fill all cells.
    router = build_grouped(Case(name), 2, pick_groups=False)
    assert int(find_pairs(router).sum()) == num_pairs
    if name != "hash_bigram":
        assert route_all(router, context()).load_E.float().std() < 20  # 512 each; labels come in runs of three


def test_more_groups_than_experts_per_group_differ() -> None:
    # 8 groups of two experts, 64 labels: no two groups are equal or complementary.
    ctx = replace(context(), features={TokenLabels: torch.arange(64).repeat(64)})
    router = GroupedRouter(
        ROUTERS.get("oracle").item, Case("oracle").config, build_large_context(), 8, pick_groups=False
    )
    expert_GT = (tabulate_weights(route_all(router, ctx))[:64] > 0).T[1::2].long()
    assert (expert_GT.sum(1) == 32).all()
    same_GG = (expert_GT[:, None] == expert_GT[None]).sum(-1).fill_diagonal_(32)
    assert (same_GG == 32).all()


def test_level_by_hand() -> None:
    # 3 groups of 4: 17 mod 12 = 5 is expert 1 of group 1.
    assert Level(num_below=4).select_expert(torch.tensor([17]), 3).item() == 1
    assert Level(num_above=3).select_expert(torch.tensor([17]), 4).item() == 1
    # Parallel groups of 4 experts: group 0 has 17 mod 4 = 1; group 1 shifts the fifth run by 4, group 2 by 8; group 5
    # is 11 in base 4: shifts of 4, and of 1 for the second run of sixteen.
    experts = [Level(group=group).select_expert(torch.tensor([17]), 4).item() for group in (0, 1, 2, 5)]
    assert experts == [1, 1, 1, (17 + 4 + 1) % 4]
    assert [Level(group=group).select_expert(torch.tensor([6]), 4).item() for group in (0, 1, 2)] == [2, 3, 0]


def test_variants_of_the_balanced_table_are_even_and_differ() -> None:
    count_V = (100_000 / torch.arange(1, 258)).long()  # of 616,000; the most frequent id is more than an eighth
    tables = [build_balanced_table(count_V, 8, variant) for variant in range(4)]
    for table_V in tables:
        load_E = torch.zeros(8, dtype=torch.int64).index_add(0, table_V, count_V)
        assert load_E.max() == count_V[0]
        assert load_E.sort().values[:-1].float().std() < 0.01 * load_E.float().mean()
    for n, one_V in enumerate(tables):
        for other_V in tables[:n]:
            assert len(set(zip(one_V.tolist(), other_V.tolist(), strict=True))) > 40


def test_first_group_has_the_table_of_a_single_router() -> None:
    case = Case("hash", 8)
    single = route(case.router_class(case.config, build_context(8)), Tokens.draw(64), training=True)
    grouped = GroupedRouter(case.router_class, case.config, build_context(16), 2, pick_groups=False)
    assert torch.equal(route(grouped, Tokens.draw(64), training=True).parts[0].expert_N, single.expert_N)
