"""Task-level and sentence-level routing: one decision for a whole sequence."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from moebench.routing.context import RouteContext
from moebench.routing.domains import check_domains, place_of, with_mean
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="p = softmax(W z),  z the embedding of the sequence's domain,  y = Σ_{i∈top-k} p_i/Σ E_i(x)",
        paper="arXiv:2110.03742, section 3.1 (TaskMoE)",
        use="Known domains, and models from which one domain's experts are cut out and served alone.",
        beware="All tokens of a domain go together: with fewer domains than experts some experts are idle, and "
        "loads are those of the data.",
        causality=Causality(causal=True, reason="the domain is known beside the text", batch_dependent=False),
    )
)
class TaskLevel(Router["TaskLevel.Config"]):
    """TaskMoE (Kudugunta et al. 2021): all tokens of a domain share their experts, which are learned.

    One domain's experts can be cut out and served alone. The paper thins the second expert as GShard does; here both
    are always used. A domain that was held out of training has the mean of all domains' vectors.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of task-level routing."""

        name: str = "task_level"
        top_k: int = 2
        """Experts of a sequence."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.embedding_GD = nn.Parameter(torch.empty(check_domains(config.name, context), context.d_model))
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k

    def init_weights(self, generator: Generator) -> None:
        """Draw embeddings of the size of normalised tokens."""
        nn.init.normal_(self.embedding_GD, generator=generator)

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        """Return k."""
        return int(config.top_k)

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse k outside 2 ... E."""
        check_top_k(config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and nothing is learned")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send all tokens of a domain to the same experts."""
        assert ctx.domain_T is not None
        place_T = place_of(ctx.domain_T, len(self.embedding_GD))
        return self._routed(self.gate(with_mean(self.embedding_GD)[place_T]))

    def _routed(self, logits_TE: Tensor) -> Routing:
        scores_TE = logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK,
            weight_TK / weight_TK.sum(-1, keepdim=True),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token: the gate; a row of the table of embeddings is only looked up."""
        return 2 * self.gate.weight_ED.numel()


@ROUTERS.register(
    Facts(
        family="static",
        equation="p = softmax(W z),  z = mean of the sequence's token vectors,  y = Σ_{i∈top-k} p_i/Σ E_i(x)",
        paper="arXiv:2110.03742, section 3.1 (sentence-level routing)",
        use="One choice for each sequence without labels, in encoders.",
        beware="The mean looks at later tokens, so it does not suit models that generate. Loads are uneven: "
        "whole sequences move at once.",
        causality=Causality(causal=False, reason="the mean is over the whole sequence", batch_dependent=False),
    )
)
class SentenceLevel(TaskLevel):
    """One decision from the mean of the sequence, padding left out: no label is needed, but later tokens are seen."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskLevel.Config):
        """Options of sentence-level routing."""

        name: str = "sentence_level"

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        Router.__init__(self, config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k

    def init_weights(self, generator: Generator) -> None:
        """Draw nothing beside the gate."""

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send all tokens of a sequence to the same experts."""
        valid_T = x_TD.new_ones(x_TD.shape[0]) if ctx.valid_T is None else ctx.valid_T.to(x_TD.dtype)
        valid_BL1 = valid_T.view(-1, ctx.sequence_length, 1).float()
        x_BLD = x_TD.float().view(-1, ctx.sequence_length, x_TD.shape[-1])
        mean_BD = (x_BLD * valid_BL1).sum(1) / valid_BL1.sum(1).clamp(min=1)
        return self._routed(self.gate(mean_BD.repeat_interleave(ctx.sequence_length, dim=0)))
