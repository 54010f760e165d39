"""DynMoE: a token uses every expert whose learned threshold its cosine score exceeds (arXiv:2405.14297).

Scores are sigmoids of scaled cosines between token and expert. Each expert has a learned threshold; all experts above
theirs are used with equal weights. A token above no threshold goes to its best expert.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.reduction import LossValue
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.selection import select
from moebench.routing.values import LayerRecord, Routing

MAX_SCALE = 100.0
"""Upper bound of τ."""


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="s = sigmoid(τ cos(x, w_e)),  t goes to e where s_te > sigmoid(τ g_e),  y = mean of the selected "
        "E_e(x)",
        paper="arXiv:2405.14297, section 3.1",
        use="When the number of experts per token is unknown and should be learned.",
        beware="The number of experts is learned, not set: read the load metrics before comparing costs. All selected "
        "experts have equal weight, so the output does not reflect confidence.",
        causality=Causality(
            causal=True, reason="each token is compared with thresholds independently", batch_dependent=False
        ),
        variable_k=True,
        budget=Knob(attribute="threshold_shift", low=-2.0, high=2.0, unit=-0.2),
        own_losses=("diversity", "simplicity"),
    )
)
class DynMoE(Router["DynMoE.Config"]):
    """Top-any gating (Guo et al. 2024): the number of experts of each token is learned.

    τ is learned (initially 1, at most 100) and scales scores and thresholds equally, as in the released code (1 in the
    paper), so it affects gradients but not the selection. Each of k selected experts has weight 1/k; the selection has
    a straight-through gradient (that of s - sigmoid(τ g)). A token above no threshold goes to its best expert, in
    training too, where the paper leaves it unrouted to create a new expert: here the number of experts is fixed. The
    loss `diversity` is ‖Ŵ Ŵᵀ - I‖ of the normalised expert vectors (0 if orthogonal), `simplicity` their mean length.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of DynMoE."""

        name: str = "dynmoe"
        expected_experts: int = 2
        """Experts per token for which the width of experts is matched; does not affect the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"diversity": 0.01, "simplicity": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts, init_scale=1.0)
        self.threshold_E = nn.Parameter(torch.zeros(context.num_experts))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.threshold_shift = 0.0
        """Added to the thresholds of all experts, in cosines."""

    def init_weights(self, generator: Generator) -> None:
        """Initialise thresholds of one half, which half of all tokens exceed, and τ = 1."""
        nn.init.zeros_(self.threshold_E)
        nn.init.zeros_(self.log_scale)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.expected_experts

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.expected_experts, num_experts, key="expected_experts")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        x_TD = x_TD.float()
        # Dividing after the product normalises both without copying either.
        length_TE = x_TD.norm(dim=-1, keepdim=True) * self.gate.weight_ED.float().norm(dim=-1)
        scale = self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp()
        logits_TE = scale * self.gate(x_TD) / length_TE.clamp(min=1e-6)
        scores_TE = logits_TE.sigmoid()
        threshold_E = scale * (self.threshold_E.float() + self.threshold_shift)
        above_TE = scores_TE - threshold_E.sigmoid()
        best_TE = functional.one_hot(rank_top_k(logits_TE, 1).squeeze(-1), self.num_experts).bool()
        passed_TE = logits_TE > threshold_E  # not by sigmoids, which a large τ rounds to 1
        used_TE = passed_TE | (best_TE & ~passed_TE.any(-1, keepdim=True))
        used_TE = used_TE.detach()
        straight_through_TE = used_TE + (above_TE - above_TE.detach())
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        routing = Routing.from_top_k(
            expert_TE,
            straight_through_TE / used_TE.sum(-1, keepdim=True),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
        return select(routing, used_TE.reshape(-1))

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        weight_ED = self.gate.weight_ED
        unit_ED = functional.normalize(weight_ED, dim=-1, eps=1e-6)
        identity_EE = torch.eye(self.num_experts, device=weight_ED.device)
        return {
            "diversity": (unit_ED @ unit_ED.T - identity_EE).norm(),
            "simplicity": weight_ED.norm(dim=-1).mean(),
        }
