"""Hash: a fixed function from the id of a token, the ids of its neighbours or its position to an expert."""

from dataclasses import dataclass
from heapq import heapreplace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import UsageError
from moebench.routing.clusters import cluster_token_ids
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature
from moebench.routing.features.padding_mask import PaddingMask
from moebench.routing.features.token_pairs import TokenPairs
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing
from moebench.seeds import derive_seed, make_generator


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = table[token id],  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (balanced assignment)",
        use="As a baseline without learned routing in language models: it is cheap, stable and hard to beat in small "
        "models.",
        beware="It ignores context. The most frequent id limits the balance: with 64 experts one of them has several "
        "times its share. It needs token ids.",
        causality=Causality(
            causal=True, reason="the expert depends on the token's own id alone", batch_dependent=False
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Hash(Router["Hash.Config"]):
    """Hash layers with a balanced table (Roller et al. 2021).

    Ids are assigned from the most to the least frequent, each to the expert with the smallest load so far; no id is
    split, so the most frequent id limits the balance. The table is a buffer and part of every checkpoint. Nothing is
    learned or computed: routing without content, and a strong baseline. The paper's clustered tables come from the
    embeddings of a trained model; here from the neighbours of each id in the training text. On two levels there is one
    table over all experts; parallel groups have a table each.
    """

    table_V: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of hash routing."""

        name: str = "hash"
        table: Literal["balanced", "random", "clustered"] = "balanced"
        """Balanced: by frequency. Random: each id to a random expert, another table in every layer. Clustered: ids with
        similar contexts share an expert, however uneven that is."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        if context.data.token_count_V is None:
            raise UsageError(f"router.name: '{config.name}' routes by token id, which this task does not have")
        table_V = build_table(getattr(config, "table", "balanced"), context.data.token_count_V, context)
        self.register_buffer("table_V", context.level.select_part(table_V, context.num_experts))

    @classmethod
    @override
    def required_features(cls, config: Any) -> tuple[Feature, ...]:
        return (TokenPairs(),) if getattr(config, "table", "") == "clustered" else ()

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.token_id_T is not None
        return route_to(self.table_V[ctx.token_id_T], self.num_experts)


def build_table(table: str, count_V: Tensor, context: RouterBuildContext) -> Tensor:
    """Return the expert of each id among those of all levels, int64 [V]; each parallel group has another table."""
    total, group = context.level.total(context.num_experts), context.level.group
    if table == "random":
        draw = make_generator("hash", context.layer, total, group)
        return torch.randint(total, count_V.shape, generator=draw, device="cpu")
    if table == "balanced":
        return build_balanced_table(count_V, total, group)
    pairs_VV = context.features.get(TokenPairs)
    if pairs_VV is None or total > len(count_V):
        raise UsageError(
            f"router.table: 'clustered' needs a text and at least as many ids as experts, {total}"
            " (allowed: balanced, random)"
        )
    return cluster_token_ids(pairs_VV, total, seed=derive_seed("clusters", group) % 2**32)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = hash(previous token id, token id) mod E,  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (bigram hash)",
        use="For hashing with a better balance: a frequent id is spread over experts by the id before it.",
        beware="Rare pairs go to random experts, so the tokens of an expert are less related. It needs token ids.",
        causality=Causality(
            causal=True,
            reason="the expert depends on the token's own id and the one before it",
            batch_dependent=False,
            reads_sequence=True,
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashBigram(Router["HashBigram.Config"]):
    """The expert of a pair of ids: a frequent id is spread over experts by the id before it.

    The first token of a sequence is paired with an extra id. The hash is multiplicative, with other factors in every
    layer; there is no table of all pairs.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The bigram hash has no options."""

        name: str = "hash_bigram"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        if context.data.token_count_V is None:
            raise UsageError(f"router.name: '{config.name}' routes by token id, which this task does not have")
        self.start_id = len(context.data.token_count_V)
        self.level, self.total = context.level, context.level.total(context.num_experts)
        self.factors = [
            derive_seed("bigram", n, context.layer, self.total, context.level.group) % PRIME for n in range(3)
        ]

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.token_id_T is not None
        id_BL = ctx.token_id_T.view(-1, ctx.sequence_length)
        before_BL = torch.cat([torch.full_like(id_BL[:, :1], self.start_id), id_BL[:, :-1]], dim=1)
        first, second, third = self.factors
        mixed_BL = (first * (before_BL + 1) % PRIME + second * (id_BL + 1) % PRIME + third) % PRIME
        mixed_BL = mixed_BL * mixed_BL % PRIME  # a plain sum would shift the experts of one id by the other
        expert_BL = self.level.select_part(mixed_BL % self.total, self.num_experts)
        return route_to(expert_BL.reshape(-1), self.num_experts)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = position mod E,  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (position hash)",
        use="As a control with even loads: it shows the gain of experts that know nothing about the token.",
        beware="Experts have nothing to specialise in. Loads are even only if E divides the sequence length.",
        causality=Causality(
            causal=True, reason="the expert depends on the token's position alone", batch_dependent=False
        ),
        balanced=True,
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashPosition(Router["HashPosition.Config"]):
    """The expert of a position in the sequence: even loads, and nothing for an expert to specialise in.

    A control that shows how much of the gain of hashing comes from the id.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The position hash has no options."""

        name: str = "hash_position"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.level = context.level

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        position_T = torch.arange(x_TD.shape[0], device=x_TD.device) % ctx.sequence_length
        return route_to(self.level.select_expert(position_T, self.num_experts), self.num_experts)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = table[next token id],  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (future token oracle)",
        use="To check the causality tests: it shows how much a router can gain by leaking the next token.",
        beware="It reveals the next token to a language model. Its loss is not a result.",
        causality=Causality(
            causal=False,
            reason="the expert depends on the next token, which a language model must predict",
            batch_dependent=False,
            reads_sequence=True,
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashFuture(Hash):
    """An oracle: the expert of the next token. It shows the gain of a leak through routing alone.

    A router with a similar loss in a language model leaks too. The last token of a sequence is routed by its own id.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The oracle has no options: its table is the balanced one."""

        name: str = "hash_future"

    @classmethod
    @override
    def required_features(cls, config: Any) -> tuple[Feature, ...]:
        return (PaddingMask(),)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.token_id_T is not None
        id_BL = ctx.token_id_T.view(-1, ctx.sequence_length)
        next_BL = torch.cat([id_BL[:, 1:], id_BL[:, -1:]], dim=1)
        valid_T = ctx.features.get(PaddingMask)
        if valid_T is not None:  # padding is no successor
            valid_BL = valid_T.view_as(id_BL)
            next_BL = next_BL.where(torch.cat([valid_BL[:, 1:], valid_BL[:, -1:]], dim=1), id_BL)
        return route_to(self.table_V[next_BL.reshape(-1)], self.num_experts)


PRIME = 2**31 - 1
"""Products of two numbers below it fit into int64."""


def route_to(expert_T: Tensor, num_experts: int) -> Routing:
    """Return the routing of each token to one expert with weight 1."""
    weight_TK = torch.ones(expert_T.shape[0], 1, dtype=torch.float32, device=expert_T.device)
    return Routing.from_top_k(expert_T.unsqueeze(-1), weight_TK, num_experts=num_experts)


def build_balanced_table(count_V: Tensor, num_experts: int, variant: int = 0) -> Tensor:
    """Return the expert of each id: most frequent first, each to the least loaded expert (ties: the lowest).

    Other variants than 0 order ids by counts times a draw from [1, 2), which groups other ids and balances as well: the
    many rare ids at the end fill the gaps that frequent ones leave.
    """
    expert_V = [0] * len(count_V)
    # Load, number of ids and index of each expert. Ids that never occur do not change the load; the second number
    # spreads them evenly instead of assigning all to one expert.
    least_loaded = [(0, 0, expert) for expert in range(num_experts)]
    counts = count_V.tolist()
    draw_V = torch.rand(len(counts), dtype=torch.float64, generator=make_generator("balanced", variant), device="cpu")
    draws = draw_V.tolist() if variant else [0.0] * len(counts)
    for token_id in sorted(range(len(counts)), key=lambda i: (-counts[i] * (1 + draws[i]), draws[i], i)):
        load, num_ids, expert = least_loaded[0]
        expert_V[token_id] = expert
        heapreplace(least_loaded, (load + counts[token_id], num_ids + 1, expert))
    return torch.tensor(expert_V, dtype=torch.int64, device="cpu")
