"""Hash: a fixed function from a token's id, its neighbours' ids or its place to an expert."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.clusters import cluster_token_ids
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing
from moebench.seeds import derive_seed, make_generator


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = table[token id],  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (balanced assignment)",
        use="A language model's baseline that learns nothing about routing: cheap, stable, hard to beat when small.",
        beware="Blind to context. The most frequent id bounds the balance: with 64 experts one of them has "
        "several times its share. Needs token ids.",
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

    Ids are dealt out from the most to the least frequent, each to the expert with the smallest load so far; no id
    is split, so the most frequent id limits the balance. The table is a buffer and part of every checkpoint.
    Nothing is learned and nothing is computed: content-blind routing, and a strong baseline. The paper's clustered
    tables come from the embeddings of a trained model; here from what stands beside each id in the training text.
    On two levels the table is the one over all experts; groups side by side have a table each.
    """

    table_V: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of hash routing."""

        name: str = "hash"
        table: Literal["balanced", "random", "clustered"] = "balanced"
        """Balanced: by frequency. Random: each id to a random expert, another table in every layer. Clustered: ids that
        stand in like contexts share an expert, however uneven that is."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        if context.data.token_count_V is None:
            raise UsageError(f"router.name: '{config.name}' routes by token id, which this task does not have")
        table_V = whole_table(getattr(config, "table", "balanced"), context.data.token_count_V, context)
        self.register_buffer("table_V", context.level.part_of(table_V, context.num_experts))

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Look each token's expert up."""
        assert ctx.token_id_T is not None
        return certain(self.table_V[ctx.token_id_T], self.num_experts)


def whole_table(table: str, count_V: Tensor, context: RouterBuildContext) -> Tensor:
    """Return the expert of each id among those of all levels, int64 [V]: another table in each group side by side."""
    total, group = context.level.total(context.num_experts), context.level.group
    if table == "random":
        draw = make_generator("hash", context.layer, total, group)
        return torch.randint(total, count_V.shape, generator=draw, device="cpu")
    if table == "balanced":
        return balanced_table(count_V, total, group)
    if context.token_pairs is None or total > len(count_V):
        raise UsageError(
            f"router.table: 'clustered' needs a text and at least as many ids as experts, {total}"
            " (allowed: balanced, random)"
        )
    return cluster_token_ids(context.token_pairs(), total, seed=derive_seed("clusters", group) % 2**32)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = hash(previous token id, token id) mod E,  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (bigram hash)",
        use="Hashing with better balance: a frequent id is spread by what stands before it.",
        beware="Rare pairs are drawn at random, so experts see less that belongs together. Needs token ids.",
        causality=Causality(
            causal=True, reason="the expert depends on the token's own id and the one before it", batch_dependent=False
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashBigram(Router["HashBigram.Config"]):
    """The expert of a pair of ids: a frequent id is spread over experts by what stands before it.

    A sequence's first token is paired with an id of its own. The hash is multiplicative, other factors in every
    layer: no table of all pairs is kept.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The bigram hash has no options."""

        name: str = "hash_bigram"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        if context.data.token_count_V is None:
            raise UsageError(f"router.name: '{config.name}' routes by token id, which this task does not have")
        self.nobody = len(context.data.token_count_V)
        self.level, self.total = context.level, context.level.total(context.num_experts)
        self.factors = [
            derive_seed("bigram", n, context.layer, self.total, context.level.group) % PRIME for n in range(3)
        ]

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Hash each token's id with that of the token before it."""
        assert ctx.token_id_T is not None
        id_BL = ctx.token_id_T.view(-1, ctx.sequence_length)
        before_BL = torch.cat([torch.full_like(id_BL[:, :1], self.nobody), id_BL[:, :-1]], dim=1)
        first, second, third = self.factors
        mixed_BL = (first * (before_BL + 1) % PRIME + second * (id_BL + 1) % PRIME + third) % PRIME
        mixed_BL = mixed_BL * mixed_BL % PRIME  # a sum alone would only shift one id's experts by the other
        expert_BL = self.level.part_of(mixed_BL % self.total, self.num_experts)
        return certain(expert_BL.reshape(-1), self.num_experts)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = position mod E,  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (position hash)",
        use="A control with even loads: what is gained without knowing anything about the token.",
        beware="Experts have nothing special to learn. Loads are even only in sequences of a length that E divides.",
        causality=Causality(causal=True, reason="the expert depends on the token's place alone", batch_dependent=False),
        balanced=True,
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashPosition(Router["HashPosition.Config"]):
    """The expert of a place in the sequence: even loads, and no reason for an expert to know anything special.

    The control that shows how much of hashing's gain is in what the id says.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The position hash has no options."""

        name: str = "hash_position"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.level = context.level

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Deal experts out along each sequence."""
        position_T = torch.arange(x_TD.shape[0], device=x_TD.device) % ctx.sequence_length
        return certain(self.level.expert_of(position_T, self.num_experts), self.num_experts)


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = table[next token id],  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (future token oracle)",
        use="To test the tests: an oracle that shows what a leak through routing is worth.",
        beware="It tells the next token to a language model. Its loss is no result.",
        causality=Causality(
            causal=False,
            reason="the expert tells something of the next token, which is what a language model must predict",
            batch_dependent=False,
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class HashFuture(Hash):
    """An oracle: the expert of the token that follows. What a leak through routing alone is worth.

    A router that comes near it in a language model cheats as it does. A sequence's last token goes by its own id.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The oracle has no options: its table is the balanced one."""

        name: str = "hash_future"

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Look the expert of each token's successor up."""
        assert ctx.token_id_T is not None
        id_BL = ctx.token_id_T.view(-1, ctx.sequence_length)
        next_BL = torch.cat([id_BL[:, 1:], id_BL[:, -1:]], dim=1)
        present_T = ctx.valid_T if ctx.present_T is None else ctx.present_T
        if present_T is not None:  # padding follows nobody
            present_BL = present_T.view_as(id_BL)
            next_BL = next_BL.where(torch.cat([present_BL[:, 1:], present_BL[:, -1:]], dim=1), id_BL)
        return certain(self.table_V[next_BL.reshape(-1)], self.num_experts)


PRIME = 2**31 - 1
"""Products of two numbers below it fit into int64."""


def certain(expert_T: Tensor, num_experts: int) -> Routing:
    """Return the routing of one expert for each token with weight 1."""
    weight_TK = torch.ones(expert_T.shape[0], 1, dtype=torch.float32, device=expert_T.device)
    return Routing.from_top_k(expert_T.unsqueeze(-1), weight_TK, num_experts=num_experts)


def balanced_table(count_V: Tensor, num_experts: int, variant: int = 0) -> Tensor:
    """Return the expert of each id: most frequent first, each to the least loaded expert (ties: the lowest).

    Another `variant` deals in an order by counts times a draw from [1, 2), which puts other ids together and evens
    the loads as well: the many rare ids at the end fill what the frequent ones leave.
    """
    table = torch.zeros(len(count_V), dtype=torch.int64)
    load_E = [0] * num_experts
    dealt_E = [0] * num_experts
    counts = count_V.tolist()
    draw_V = torch.rand(len(counts), dtype=torch.float64, generator=make_generator("balanced", variant), device="cpu")
    draws = draw_V.tolist() if variant else [0.0] * len(counts)
    for token_id in sorted(range(len(counts)), key=lambda i: (-counts[i] * (1 + draws[i]), draws[i], i)):
        # Ids that never occur do not change the load; spread them by number instead of piling them on one expert.
        expert = min(range(num_experts), key=lambda e: (load_E[e], dealt_E[e], e))
        table[token_id] = expert
        load_E[expert] += counts[token_id]
        dealt_E[expert] += 1
    return table
