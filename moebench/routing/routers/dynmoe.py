"""DynMoE: every expert has a learned threshold, and a token uses all experts whose threshold it passes."""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing

LARGEST_SCALE = 100.0


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="s = sigmoid(τ cos(x, w_e)),  t goes to e where s_te > sigmoid(τ g_e),  y = mean of the chosen E_e(x)",
        paper="arXiv:2405.14297, section 3.1",
        use="When the number of experts per token is not known in advance and shall be learned.",
        beware="The number of experts is found and not set: read the load metrics before comparing costs. All "
        "chosen experts weigh the same, so the output does not tell sure from unsure.",
        causality=Causality(
            causal=True, reason="each token is compared with thresholds on its own", batch_dependent=False
        ),
        variable_k=True,
        own_losses=("diversity", "simplicity"),
    )
)
class DynMoE(Router["DynMoE.Config"]):
    """Top-any gating (Guo et al. 2024): the number of experts of each token is learned.

    τ is learned, from 1 and up to 100, and scales score and threshold alike, as in the released code: who is chosen
    does not depend on it, only the gradients do. The paper's equation has τ = 1. Chosen experts weigh 1/k; their choice
    gets its gradient straight through (that of s - sigmoid(τ g)). A token that passes no threshold goes to its best
    expert, in training too, where the paper leaves it unrouted to seed a new expert: here the number of experts is
    fixed. The losses keep expert vectors apart and short.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of DynMoE."""

        name: str = "dynmoe"
        expected_experts: int = 2
        """Experts per token by which the width of experts is matched; says nothing about the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"diversity": 0.01, "simplicity": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts, init_scale=1.0)
        self.threshold_E = nn.Parameter(torch.zeros(context.num_experts))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def init_weights(self, generator: Generator) -> None:
        """Start with thresholds of one half, which half of all tokens pass, and τ = 1."""
        nn.init.zeros_(self.threshold_E)
        nn.init.zeros_(self.log_scale)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return the number that arms are matched at."""
        return config.expected_experts

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a number outside 1 ... E."""
        check_top_k(config.expected_experts, num_experts, key="expected_experts")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to every expert whose threshold it passes, at least to its best."""
        x_TD = x_TD.float()
        # Divided after the product: lengths of 1 for both without a copy of either.
        length_TE = x_TD.norm(dim=-1, keepdim=True) * self.gate.weight_ED.float().norm(dim=-1)
        scale = self.log_scale.float().clamp(max=math.log(LARGEST_SCALE)).exp()
        logits_TE = scale * self.gate(x_TD) / length_TE.clamp(min=1e-6)
        scores_TE = logits_TE.sigmoid()
        threshold_E = scale * self.threshold_E.float()
        above_TE = scores_TE - threshold_E.sigmoid()
        best_TE = functional.one_hot(rank_top_k(logits_TE, 1).squeeze(-1), self.num_experts).bool()
        passed_TE = logits_TE > threshold_E  # a large τ makes both sigmoids 1
        used_TE = passed_TE | (best_TE & ~passed_TE.any(-1, keepdim=True))
        used_TE = used_TE.detach()
        straight_TE = used_TE + (above_TE - above_TE.detach())
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        return (
            Routing.from_top_k(
                expert_TE,
                straight_TE / used_TE.sum(-1, keepdim=True),
                num_experts=self.num_experts,
                logits_TE=logits_TE,
                scores_TE=scores_TE,
            )
            .keep(used_TE.reshape(-1))
            .compact()
        )  # a hole would keep a place that rerouting may need

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return ‖Ŵ Ŵᵀ - I‖ of the unit expert vectors (0 when orthogonal) and the mean length of the vectors."""
        weight_ED = self.gate.weight_ED
        unit_ED = functional.normalize(weight_ED, dim=-1, eps=1e-6)
        identity_EE = torch.eye(self.num_experts, device=weight_ED.device)
        return {
            "diversity": (unit_ED @ unit_ED.T - identity_EE).norm(),
            "simplicity": weight_ED.norm(dim=-1).mean(),
        }
