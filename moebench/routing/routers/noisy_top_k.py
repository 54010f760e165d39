"""Noisy top-k: learned noise on the logits explores, two squared variations balance."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.losses import squared_variation
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing

MIN_NOISE = 0.01


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="h̃ = W x + N(0,1)·(softplus(W_n x) + 0.01),  w = softmax(h̃_top-k),  y = Σ_i w_i E_i(x)",
        paper="arXiv:1701.06538, eq. 3-5 and 8-10",
        use="The first sparse router: exploration by learned noise, and losses for weights and loads.",
        beware="Needs k of at least 2. Noise makes training and evaluation differ, and its scale may shrink to 0 "
        "before experts have found their place.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own noise", batch_dependent=False
        ),
        own_losses=("load",),
    )
)
class NoisyTopK(Router["NoisyTopK.Config"]):
    """Noisy top-k gating (Shazeer et al. 2017); without noise in evaluation.

    Both projections start at zero, as in the paper: routing is uniform at first and the noise alone explores. The 0.01
    keeps its scale from vanishing, as in the authors' code.
    Needs k >= 2: at k=1 the softmax over the kept logits is always 1 and the router gets no gradient.
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
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 2 ... E."""
        check_top_k(config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and nothing is learned")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its k experts with the highest noisy logits."""
        clean_TE = self.gate(x_TD)
        noisy_TE, extras = clean_TE, {}
        if ctx.training:
            std_TE = functional.softplus(self.noise_gate(x_TD)) + MIN_NOISE
            noisy_TE = clean_TE + ctx.normal(*clean_TE.shape) * std_TE
            extras = {"load_E": smooth_load(clean_TE, noisy_TE, std_TE, self.top_k, ctx.valid_T)}
        expert_TK = rank_top_k(noisy_TE, self.top_k)
        routing = Routing.from_top_k(
            expert_TK,
            noisy_TE.gather(-1, expert_TK).softmax(-1),
            num_experts=self.num_experts,
            logits_TE=noisy_TE,
            scores_TE=noisy_TE.softmax(-1),
        )
        return replace(routing, extras=extras)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the load loss: squared variation of the smooth estimate of each expert's load (eq. 10-11)."""
        smooth_E = record.routing.extras.get("load_E")
        return {"load": squared_variation(record.load_E.float() if smooth_E is None else record.total(smooth_E))}

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Count the gate alone in evaluation, where there is no noise to scale."""
        idle = 0 if "load_E" in record.routing.extras else 2 * self.noise_gate.weight_ED.numel()
        return super().executed_flops(record) - record.num_positions * idle


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int, valid_T: Tensor | None) -> Tensor:
    """Return the expected load of each expert under fresh noise on its own logit (eq. 8-9).

    Over the noise it sums to k·T in the mean, and not in each draw.

    An expert is chosen when its logit passes the k-th best of the *others*: the (k+1)-th noisy value for one that
    is in the top k now, the k-th for one that is not. (V-MoE's shortcut, the k-th for all, is biased.)
    """
    if top_k == clean_TE.shape[-1]:
        chosen_TE = torch.ones_like(clean_TE)
    else:
        best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
        inside_T1, outside_T1 = best_TK[:, top_k : top_k + 1], best_TK[:, top_k - 1 : top_k]
        threshold_TE = torch.where(noisy_TE > inside_T1, inside_T1, outside_T1)
        chosen_TE = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
    return chosen_TE.sum(0) if valid_T is None else (chosen_TE * valid_T[:, None]).sum(0)
