"""GShard top-2 gating and its successors ST-MoE and GLaM (arXiv:2006.16668, 2202.08906, 2112.06905).

Each token goes to its most probable expert. Its second most probable expert is kept by a policy, in GShard with a
probability proportional to its weight, which saves slots under a capacity. The two weights are renormalised.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, uniform_to_gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  g = (p_1, p_2) / (p_1 + p_2),  second kept with probability min(1, g_2 / τ)",
        paper="arXiv:2006.16668, section 2.2 and algorithm 1",
        use="With a capacity: this is the classic top-2 router, and leaving out the second expert saves slots.",
        beware="It is not causal with a capacity: second choices queue behind the first choices of later tokens. The "
        "balance loss counts first choices only.",
        causality=Causality(
            causal=True,
            reason="dropless, each token is routed by its own vector",
            batch_dependent=False,
            with_capacity=False,  # second choices queue behind the first choices of later tokens
        ),
        variable_k=True,
        own_losses=("first_choice_balance",),
    )
)
class GShard(Router["GShard.Config"]):
    """Top-2 token choice (Lepikhin et al. 2020) with weights normalised before any drop.

    The balance loss counts first choices only, as in the paper; its value is 1 at uniform routing (the paper's E² ·
    mean is the same number). The paper keeps the second expert by policy `random`; the other policies are those of
    public implementations (mesh-TensorFlow with a threshold of 0.2, fairseq). Policies are random in training only: in
    evaluation `random` and `sampling` always keep the second best expert, unlike implementations that keep sampling.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of GShard."""

        name: str = "gshard"
        second_expert: Literal["all", "random", "sampling", "threshold", "none"] = "random"
        """all: keep the second best; random: keep it with probability min(1, g_2 / threshold); sampling: sample the
        second expert from the softmax over the others; threshold: keep the second best if g_2 > threshold; none: drop
        it."""
        threshold: float = 0.5
        """Second weight τ above which the second expert is always kept (policies random and threshold). The paper's 0.5
        keeps it with probability min(1, 2 g_2)."""
        losses: dict[str, float] = field(default_factory=lambda: {"first_choice_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.second_expert = config.second_expert
        self.threshold = config.threshold

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return 1 if config.second_expert == "none" else 2

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(2, num_experts, smallest=2)
        require(0 < config.threshold < math.inf, "router.threshold", config.threshold, "greater than 0 and finite")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        draw_TE = ctx.uniform(*logits_TE.shape) if ctx.training else None
        expert_TK = self._select_two(logits_TE, draw_TE)
        best_TK = scores_TE.gather(-1, expert_TK)
        weight_TK = best_TK / best_TK.sum(-1, keepdim=True)
        # All first choices have priority over all second choices; within each, earlier tokens over later ones.
        num_tokens = x_TD.shape[0]
        offset_K = ctx.batch_tokens(num_tokens) * torch.arange(2, device=x_TD.device)
        priority_TK = -offset_K - ctx.position_T(num_tokens).unsqueeze(-1)
        routing = Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            token_extras={"first_T": expert_TK[:, 0]},
        )
        routing = replace(routing, priority_N=priority_TK.reshape(-1))
        keeps_second_T = self._keep_second(weight_TK[:, 1], draw_TE)
        if keeps_second_T is None:
            return routing
        return routing.keep(torch.stack([torch.ones_like(keeps_second_T), keeps_second_T], dim=-1).reshape(-1))

    def _select_two(self, logits_TE: Tensor, draw_TE: Tensor | None) -> Tensor:
        expert_TK = rank_top_k(logits_TE, 2)
        if self.second_expert != "sampling" or draw_TE is None:
            return expert_TK
        first_T1 = expert_TK[:, :1]
        others_TE = (logits_TE.detach() + uniform_to_gumbel(draw_TE)).scatter(-1, first_T1, -torch.inf)
        return torch.cat([first_T1, rank_top_k(others_TE, 1)], dim=-1)

    def _keep_second(self, second_T: Tensor, draw_TE: Tensor | None) -> Tensor | None:
        """Return which tokens keep their second expert (bool), None if all do; `second_T` is its weight."""
        if self.second_expert == "none":
            return torch.zeros_like(second_T, dtype=torch.bool)
        if self.second_expert == "threshold":
            return second_T > self.threshold
        if self.second_expert == "random" and draw_TE is not None:
            return second_T > draw_TE[:, 0] * self.threshold
        return None

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        routing = record.routing
        scores_TE = routing.scores_TE
        assert scores_TE is not None
        first_TE = torch.nn.functional.one_hot(routing.token_extras["first_T"], self.num_experts).to(scores_TE.dtype)

        def formula(share_E: Tensor, mean_E: Tensor) -> Tensor:
            return self.num_experts * torch.dot(share_E, mean_E)

        return {"first_choice_balance": reduce_record(record, formula, means=[first_TE, scores_TE])}


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="as gshard, and the z-loss mean_t (log Σ_e exp h_te)²",
        paper="arXiv:2202.08906, sections 2 and 3.3",
        use="For GShard's routing when training is unstable: the z-loss keeps logits small.",
        beware="As gshard. The z-loss pulls the log-sum-exp to 0, not the logits; a large coefficient makes routing "
        "uniform.",
        causality=Causality(causal=True, reason="as gshard", batch_dependent=False, with_capacity=False),
        variable_k=True,
        own_losses=("first_choice_balance",),
    )
)
class STMoE(GShard):
    """ST-MoE's router (Zoph et al. 2022): GShard's top-2 with a z-loss that keeps the logits small.

    The threshold of 0.2 is that of the public implementation, mesh-TensorFlow. The paper's models have experts in every
    fourth block, capacity factors of 1.25 in training and 2.0 in evaluation, and extra dense networks; the layout sets
    these.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(GShard.Config):
        """Options of gshard with ST-MoE's defaults."""

        name: str = "st_moe"
        threshold: float = 0.2
        losses: dict[str, float] = field(default_factory=lambda: {"first_choice_balance": 0.01, "z": 0.001})


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  g = (p_1, p_2) / (p_1 + p_2),  y = g_1 E_1(x) + g_2 E_2(x)",
        paper="arXiv:2112.06905, section 4",
        use="For top-2 that always uses both experts: it is GShard without randomness.",
        beware="As gshard, it is not causal with a capacity.",
        causality=Causality(causal=True, reason="as gshard", batch_dependent=False, with_capacity=False),
        own_losses=("first_choice_balance",),
    )
)
class GLaM(GShard):
    """GLaM's router (Du et al. 2021): GShard's top-2 that always uses both experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GShard.Config):
        """Options of gshard with GLaM's defaults."""

        name: str = "glam"
        second_expert: Literal["all", "random", "sampling", "threshold", "none"] = "all"
