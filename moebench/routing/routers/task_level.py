"""Task-level and sentence-level routing: one decision for a whole sequence (arXiv:2110.03742).

TaskMoE routes by a learned embedding of the sequence's domain, sentence-level routing by the mean of its token vectors.
All tokens of the sequence go to the same k experts, with renormalised weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.domains import append_mean, check_domains, get_domain_index
from moebench.routing.gate import Gate
from moebench.routing.linear_map import TABLE, LinearMap
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="p = softmax(W z),  z the embedding of the sequence's domain,  y = Σ_{i∈top-k} p_i/Σ E_i(x)",
        paper="arXiv:2110.03742, section 3.1 (TaskMoE)",
        use="When domains are known, and the experts of one domain should be extracted and served alone.",
        beware="All tokens of a domain share their experts: with fewer domains than experts some are idle, and loads "
        "are those of the data.",
        causality=Causality(causal=True, reason="the domain is given with the text", batch_dependent=False),
    )
)
class TaskLevel(Router["TaskLevel.Config"]):
    """TaskMoE (Kudugunta et al. 2021): all tokens of a domain share their experts, and the mapping is learned.

    The experts of one domain can be extracted and served alone. The paper drops the second expert at random as GShard
    does; here both are always used. A domain held out of training uses the mean of all domains' embeddings.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of task-level routing."""

        name: str = "task_level"
        top_k: int = 2
        """Experts per sequence."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.embedding_GD = nn.Parameter(torch.empty(check_domains(config.name, context), context.d_model))
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k

    def init_weights(self, generator: Generator) -> None:
        """Initialise embeddings at the scale of normalised tokens."""
        nn.init.normal_(self.embedding_GD, generator=generator)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return that the embeddings are a table: what multiplies them is the gate."""
        return {"embedding_GD": TABLE}

    @classmethod
    @override
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        return int(config.top_k)

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        check_top_k(
            config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and the router learns nothing"
        )

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.domain_T is not None
        row_T = get_domain_index(ctx.domain_T, len(self.embedding_GD))
        return self._route_logits(self.gate(append_mean(self.embedding_GD)[row_T]))

    def _route_logits(self, logits_TE: Tensor) -> Routing:
        rule = TopKRule(top_k=self.top_k, weights="shares")
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule)
        return Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )

    @override
    def flops_per_token(self) -> int:
        return 2 * self.gate.weight_ED.numel()  # the embedding is a lookup


@ROUTERS.register(
    Facts(
        family="static",
        equation="p = softmax(W z),  z = mean of the sequence's token vectors,  y = Σ_{i∈top-k} p_i/Σ E_i(x)",
        paper="arXiv:2110.03742, section 3.1 (sentence-level routing)",
        use="For one choice per sequence without labels, in encoders.",
        beware="The mean includes later tokens, so it does not suit autoregressive models. Loads are uneven, because "
        "whole sequences are routed together.",
        causality=Causality(
            causal=False, reason="the mean is over the whole sequence", batch_dependent=False, reads_sequence=True
        ),
    )
)
class SentenceLevel(TaskLevel):
    """One decision per sequence from the mean of its valid tokens: needs no label, but is not causal."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskLevel.Config):
        """Options of sentence-level routing."""

        name: str = "sentence_level"

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        Router.__init__(self, config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k

    @override
    def init_weights(self, generator: Generator) -> None:
        pass  # only the gate, which initialises itself

    @override
    def linear_maps(self) -> dict[str, LinearMap]:
        return {}

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        valid_T = x_TD.new_ones(x_TD.shape[0]) if ctx.valid_T is None else ctx.valid_T.to(x_TD.dtype)
        valid_BL1 = valid_T.view(-1, ctx.sequence_length, 1).float()
        x_BLD = x_TD.float().view(-1, ctx.sequence_length, x_TD.shape[-1])
        mean_BD = (x_BLD * valid_BL1).sum(1) / valid_BL1.sum(1).clamp(min=1)
        return self._route_logits(self.gate(mean_BD.repeat_interleave(ctx.sequence_length, dim=0)))
