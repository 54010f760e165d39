"""Noisy top-k gating: trainable noise on the logits explores; importance and load losses balance (arXiv:1701.06538).

In training, Gaussian noise with a learned scale for each token and expert is added to the logits. The k highest noisy
logits select the experts, and a softmax over these k gives the weights. Evaluation uses the logits without noise.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.losses import compute_squared_variation
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing

MIN_NOISE_STD = 0.01
"""Smallest standard deviation of the noise."""


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="h̃ = W x + N(0,1)·(softplus(W_n x) + 0.01),  w = softmax(h̃_top-k),  y = Σ_i w_i E_i(x)",
        paper="arXiv:1701.06538, eq. 3-5 and 8-10",
        use="For the router of the first sparsely-gated MoE: learned noise explores, and losses balance both weights "
        "and loads.",
        beware="It needs k ≥ 2. Noise makes training and evaluation differ, and its scale may shrink to 0 before "
        "experts have specialised.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own noise", batch_dependent=False
        ),
        own_losses=("load",),
    )
)
class NoisyTopK(Router["NoisyTopK.Config"]):
    """Noisy top-k gating (Shazeer et al. 2017); no noise in evaluation.

    Both projections start at zero, as in the paper: routing is uniform at first and the noise alone explores. The
    minimum scale of 0.01 keeps the noise from vanishing, as in the authors' code. The loss `load` is the squared
    coefficient of variation of a differentiable estimate of the loads (eq. 10-11). k ≥ 2 is required: at k=1 the
    softmax over the selected logits is always 1 and the router gets no gradient from the task loss.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of noisy top-k."""

        name: str = "noisy_top_k"
        top_k: int = 2
        """Experts per token, at least 2."""
        losses: dict[str, float] = field(default_factory=lambda: {"importance": 0.01, "load": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts, init_scale=0.0)
        self.noise_gate = Gate(context.d_model, context.num_experts, init_scale=0.0)
        self.top_k = config.top_k

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(
            config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and the router learns nothing"
        )

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        clean_TE = self.gate(x_TD)
        noisy_TE, extras = clean_TE, {}
        if ctx.training:
            std_TE = functional.softplus(self.noise_gate(x_TD)) + MIN_NOISE_STD
            noisy_TE = clean_TE + ctx.normal(*clean_TE.shape) * std_TE
            extras = {"load_E": estimate_smooth_load(clean_TE, noisy_TE, std_TE, self.top_k, ctx.valid_T)}
        rule = TopKRule(top_k=self.top_k, weights="softmax")
        expert_TK, weight_TK, scores_TE = choose_top_k(noisy_TE, rule)
        routing = Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=noisy_TE,
            scores_TE=scores_TE,
        )
        return replace(routing, extras=extras)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        smooth_E = record.routing.extras.get("load_E")
        load_E = record.routing.load_E.float() if smooth_E is None else smooth_E
        return {"load": reduce_record(record, compute_squared_variation, totals=[load_E])}

    @override
    def executed_flops(self, record: LayerRecord) -> Tensor:
        # Evaluation has no noise, so the noise gate is not computed.
        unused = 0 if "load_E" in record.routing.extras else 2 * self.noise_gate.weight_ED.numel()
        return super().executed_flops(record) - record.num_positions * unused


def estimate_smooth_load(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int, valid_T: Tensor | None
) -> Tensor:
    """Return the expected load of each expert if the noise on its own logit were drawn again (eq. 8-9), [E].

    An expert is selected when its logit exceeds the k-th best of the *other* experts: the (k+1)-th noisy logit for an
    expert that is now in the top k, the k-th for one that is not. (V-MoE's code uses the k-th for all, which is
    biased.) The loads sum to k·T in expectation over the noise, not in each draw.
    """
    if top_k == clean_TE.shape[-1]:
        probability_TE = torch.ones_like(clean_TE)
    else:
        best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
        inside_T1, outside_T1 = best_TK[:, top_k : top_k + 1], best_TK[:, top_k - 1 : top_k]
        threshold_TE = torch.where(noisy_TE > inside_T1, inside_T1, outside_T1)
        probability_TE = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
    return probability_TE.sum(0) if valid_T is None else (probability_TE * valid_T[:, None]).sum(0)
