"""Routers that do not learn, in layouts of groups: all experts are used, and groups side by side do not repeat."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import OPTIONS, Case, Tokens, build_context, randomise_parameters, route, tabulate_weights
from torch import Tensor

from moebench.routing.composite import GroupedRouter
from moebench.routing.context import RouteContext
from moebench.routing.features.padding_mask import PaddingMask
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.features.token_pairs import TokenPairs
from moebench.routing.level import Level
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.routers.hash import balanced_table
from moebench.routing.values import Routing

LENGTH, NUM_SEQUENCES, NUM_EXPERTS, VOCAB = 64, 64, 16, 200
FIXED = ("hash", "hash_bigram", "hash_position", "hash_future", "oracle", "domain", "domain_posterior")
"""Routers that are one function of what is known of a token: the same in every step, without parameters."""


def static_cases() -> list[Case]:
    """Return every router that learns nothing or counts as static, with all its options."""
    cases = []
    for entry in ROUTERS.entries():
        if entry.item.form.is_dense or (entry.facts.learned and entry.facts.family != "static"):
            continue
        cases += [Case(entry.name, NUM_EXPERTS, options) for options in ({}, *OPTIONS.get(entry.name, []))]
    return cases


every_static_case = pytest.mark.parametrize("case", static_cases(), ids=str)
every_fixed_case = pytest.mark.parametrize("case", [c for c in static_cases() if c.name in FIXED], ids=str)


def place(num_experts: int = NUM_EXPERTS) -> RouterBuildContext:
    """Return the place of a router in a model with 200 ids and 64 domains."""
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


def grouped(case: Case, groups: int, *, pick_groups: bool) -> Any:
    return randomise_parameters(GroupedRouter(case.router_class, case.config, place(), groups, pick_groups=pick_groups))


def context(seed: int = 0, *, training: bool = True, valid_T: Tensor | None = None) -> RouteContext:
    """Return 4096 tokens with 200 ids, 16 labels and a domain for each of 64 sequences."""
    drawn = Tokens.draw(LENGTH * NUM_SEQUENCES, length=LENGTH).context(training=training, seed=seed)
    domain_T = torch.arange(NUM_SEQUENCES).repeat_interleave(LENGTH)
    return replace(
        drawn,
        token_id_T=torch.randint(VOCAB, domain_T.shape, generator=torch.Generator().manual_seed(1)),
        domain_T=domain_T,
        features={TokenLabels: torch.arange(len(domain_T)) // 3 % 16}
        | ({} if valid_T is None else {PaddingMask: valid_T}),
        valid_T=valid_T,
    )


def routed(router: Any, ctx: RouteContext) -> Routing:
    return router(Tokens.draw(LENGTH * NUM_SEQUENCES, length=LENGTH).x_TD, ctx)


def load_over_draws(router: Any) -> Tensor:
    """Return the load of many steps: some routers draw one expert for a whole batch."""
    return torch.stack([routed(router, context(seed)).load_E for seed in range(100)]).sum(0)


@every_static_case
def test_two_levels_use_every_expert(case: Case) -> None:
    load_E = load_over_draws(grouped(case, 4, pick_groups=True))
    assert (load_E > 0).all(), load_E.tolist()
    if case.facts.balanced and not case.options:
        assert load_E.min() == load_E.max(), load_E.tolist()


@every_fixed_case
def test_a_fixed_function_on_two_levels_is_the_same_on_one(case: Case) -> None:
    flat = randomise_parameters(case.router_class(case.config, place()))
    valid_T = torch.arange(LENGTH * NUM_SEQUENCES) % LENGTH < 50
    for padding in (None, valid_T):
        ctx = context(valid_T=padding)
        one, two = routed(flat, ctx), routed(grouped(case, 4, pick_groups=True), ctx)
        keep = slice(None) if padding is None else padding
        assert torch.equal(tabulate_weights(one)[keep], tabulate_weights(two)[keep])


def test_positions_on_two_levels_have_equal_loads() -> None:
    assert routed(grouped(Case("hash_position"), 4, pick_groups=True), context()).load_E.tolist() == [256] * 16


@pytest.mark.parametrize("evaluation", ["label", "prior"])
def test_shares_of_domains_on_two_levels_are_those_on_one(evaluation: str) -> None:
    case = Case("domain", NUM_EXPERTS, {"evaluation": evaluation})
    flat, both = case.router_class(case.config, place()), grouped(case, 4, pick_groups=True)
    load_E = torch.arange(16)  # expert 0 has never seen a token
    flat.after_step(load_E, {})
    both.after_step(load_E, {})
    ctx = context(training=False)
    assert ctx.domain_T is not None
    ctx = replace(ctx, domain_T=ctx.domain_T + 32)  # half of them were held out
    torch.testing.assert_close(tabulate_weights(routed(both, ctx)), tabulate_weights(routed(flat, ctx)))


def pairs_of(router: Any) -> Tensor:
    """Return which experts of two groups some token has together, bool [8, 8]."""
    table_TE = tabulate_weights(routed(router, context())) > 0
    first_TE, second_TE = table_TE.float().split(NUM_EXPERTS // 2, dim=-1)
    return first_TE.T @ second_TE > 0


@every_static_case
def test_groups_side_by_side_do_not_repeat_one_table(case: Case) -> None:
    if case.options.get("training", "batch") == "batch" and case.name == "thor":
        return  # one expert of each group for the whole batch
    num_pairs = int(pairs_of(grouped(case, 2, pick_groups=False)).sum())
    # One table twice has 8 pairs; 200 ids in 64 pairs fill 61 by chance, 64 domains with two experts each at least 24.
    assert num_pairs > 24 or (case.name == "oracle" and num_pairs == 16), num_pairs


@pytest.mark.parametrize(
    ("name", "num_pairs"), [("hash_position", 64), ("hash_bigram", 64), ("oracle", 16), ("domain", 64)]
)
def test_pairs_of_two_groups(name: str, num_pairs: int) -> None:
    # 64 positions or domains and 16 labels have a pair each; of 2500 pairs of ids no cell stays empty.
    router = grouped(Case(name), 2, pick_groups=False)
    assert int(pairs_of(router).sum()) == num_pairs
    if name != "hash_bigram":
        assert routed(router, context()).load_E.float().std() < 20  # 512 each; labels come in runs of three


def test_more_groups_than_experts_in_each_still_differ() -> None:
    # 8 groups of two experts: 64 positions, and no two groups that say the same or the opposite of each.
    ctx = replace(context(), features={TokenLabels: torch.arange(64).repeat(64)})
    router = GroupedRouter(ROUTERS.get("oracle").item, Case("oracle").config, place(), 8, pick_groups=False)
    expert_GT = (tabulate_weights(routed(router, ctx))[:64] > 0).T[1::2].long()
    assert (expert_GT.sum(1) == 32).all()
    same_GG = (expert_GT[:, None] == expert_GT[None]).sum(-1).fill_diagonal_(32)
    assert (same_GG == 32).all()


def test_parts_of_a_number_by_hand() -> None:
    # 3 groups of 4: 17 mod 12 = 5 is expert 1 of group 1.
    assert Level(num_below=4).expert_of(torch.tensor([17]), 3).item() == 1
    assert Level(num_above=3).expert_of(torch.tensor([17]), 4).item() == 1
    # Side by side, of 4 experts: group 0 has 17 mod 4 = 1; group 1 moves the fifth run on by 4, group 2 by 8; group 5
    # is 11 to the base 4: by 4 and by 1, the second run of sixteen.
    found = [Level(group=group).expert_of(torch.tensor([17]), 4).item() for group in (0, 1, 2, 5)]
    assert found == [1, 1, 1, (17 + 4 + 1) % 4]
    assert [Level(group=group).expert_of(torch.tensor([6]), 4).item() for group in (0, 1, 2)] == [2, 3, 0]


def test_other_balanced_tables_are_as_even() -> None:
    count_V = (100_000 / torch.arange(1, 258)).long()  # of 616,000; the most frequent id is more than an eighth
    tables = [balanced_table(count_V, 8, variant) for variant in range(4)]
    for table_V in tables:
        load_E = torch.zeros(8, dtype=torch.int64).index_add(0, table_V, count_V)
        assert load_E.max() == count_V[0]
        assert load_E.sort().values[:-1].float().std() < 0.01 * load_E.float().mean()
    for n, one_V in enumerate(tables):
        for other_V in tables[:n]:
            assert len(set(zip(one_V.tolist(), other_V.tolist(), strict=True))) > 40


def test_a_group_of_its_own_table_stays_as_it_is() -> None:
    # The first group has the table of a router that stands alone.
    case = Case("hash", 8)
    alone = route(case.router_class(case.config, build_context(8)), Tokens.draw(64), training=True)
    both = GroupedRouter(case.router_class, case.config, build_context(16), 2, pick_groups=False)
    assert torch.equal(route(both, Tokens.draw(64), training=True).parts[0].expert_N, alone.expert_N)
