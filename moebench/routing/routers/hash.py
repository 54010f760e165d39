"""Hash: a fixed table from token id to expert, filled so that the experts' loads are even."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Facts, Router, RouterConfig, Site
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = table[token id],  y = E_i(x)",
        paper="arXiv:2106.04426, section 3.1 (balanced assignment)",
        causal=True,
        causal_reason="the expert depends on the token's own id alone",
        batch_dependent=False,
        learned=False,
        makes_scores=False,
    )
)
class Hash(Router):
    """Hash layers with a balanced table (Roller et al. 2021).

    Ids are dealt out from the most to the least frequent, each to the expert with the smallest load so far; no id
    is split, so the most frequent id limits the balance. The table is a buffer and part of every checkpoint.
    Nothing is learned and nothing is computed: content-blind routing, and a strong baseline.
    """

    table_V: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of hash routing."""

        name: str = "hash"

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        if site.token_count_V is None:
            raise UsageError("router.name: 'hash' routes by token id, which this task does not have")
        self.register_buffer("table_V", balanced_table(site.token_count_V, site.num_experts))

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Look each token's expert up."""
        assert ctx.token_id_T is not None
        expert_TK = self.table_V[ctx.token_id_T].unsqueeze(-1)
        weight_TK = torch.ones(expert_TK.shape, dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)


def balanced_table(count_V: Tensor, num_experts: int) -> Tensor:
    """Return the expert of each id: most frequent first, each to the least loaded expert (ties: the lowest)."""
    table = torch.zeros(len(count_V), dtype=torch.int64)
    load_E = [0] * num_experts
    dealt_E = [0] * num_experts
    counts = count_V.tolist()
    for token_id in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        # Ids that never occur do not change the load; spread them by number instead of piling them on one expert.
        expert = min(range(num_experts), key=lambda e: (load_E[e], dealt_E[e], e))
        table[token_id] = expert
        load_E[expert] += counts[token_id]
        dealt_E[expert] += 1
    return table
