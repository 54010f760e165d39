"""LIMoE: V-MoE with one expert per token, and entropies that keep every modality spread over several experts."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.v_moe import VMoE
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x + noise),  y = p_i · E_i(x), i = argmax p;  losses mean_t H(p_t) and, for each"
        " domain d, max(0, ln S - H(mean_{t∈d} p_t))",
        paper="arXiv:2206.02770, section 2.2 (entropy losses)",
        use="Data of unlike kinds in one model: entropy losses keep a small kind from having one expert only.",
        beware="Thresholds are for each domain: more than the data need make experts alike. Batch priority "
        "looks at the whole batch.",
        causality=Causality(
            causal=True,
            reason="dropless, each token is routed by its own vector and its own noise",
            batch_dependent=False,
            with_capacity=False,  # batch prioritized, as V-MoE
        ),
        own_losses=("score_importance", "load", "domain_entropy"),
    )
)
class LIMoE(VMoE):
    """One expert per token, batch prioritized, with local and global entropy losses (Mustafa et al. 2022).

    Losses over all tokens are content when each modality has one expert of its own; the global entropy of each
    modality is not, as long as its tokens use fewer than S experts. Here a modality is a domain of the task; a task
    that names none has one. The paper gives both entropies to text alone, whose tokens are few beside those of images;
    here all domains have them. Its weights were found for images with text: 0.04 for both is where to start. Its code
    is not public; the other coefficients, and priority in evaluation alone, are those of V-MoE's.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(VMoE.Config):
        """Options of LIMoE."""

        name: str = "limoe"
        top_k: int = 1
        """Experts per token."""
        least_experts: int | None = None
        """S: a domain whose tokens are spread as evenly as over so many experts has no loss; null: all experts."""
        losses: dict[str, float] = field(
            default_factory=lambda: {
                "score_importance": 0.005,
                "load": 0.005,
                "z": 0.001,
                "local_entropy": 0.04,
                "domain_entropy": 0.04,
            }
        )

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_domains = context.data.num_domains or 1
        self.least_experts: int = config.least_experts or context.num_experts

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse what V-MoE refuses, and a number of experts that there are not."""
        super().check(config, num_experts)
        least = config.least_experts
        fits = least is None or 1 <= least <= num_experts
        require(fits, "router.least_experts", least, f"null or from 1 to layout.num_experts={num_experts}")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its most probable expert, and note its domain."""
        routing = super().forward(x_TD, ctx)
        domain_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
        domain_T = domain_T if ctx.domain_T is None else ctx.domain_T
        return replace(routing, token_extras={"domain_T": domain_T})

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return V-MoE's losses, and the mean over domains of what the entropy of their mean probabilities lacks."""
        return super().losses(record) | {"domain_entropy": self._domain_entropy(record)}

    def _domain_entropy(self, record: LayerRecord) -> Tensor:
        """0 when each domain is spread over S experts or more, ln S when each has one expert."""
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        in_domain_TG = functional.one_hot(record.routing.token_extras["domain_T"], self.num_domains).to(logits_TE.dtype)
        if record.valid_T is not None:
            in_domain_TG = in_domain_TG * record.valid_T.unsqueeze(-1)
        sum_GE = record.total(in_domain_TG.T @ logits_TE.softmax(-1))
        share_G = sum_GE.sum(-1)  # its tokens; 0 where a domain does not occur, which then does not count
        mean_GE = sum_GE / share_G.clamp(min=1).unsqueeze(-1)
        entropy_G = -(mean_GE * mean_GE.clamp(min=1e-20).log()).sum(-1)
        lacking_G = (math.log(self.least_experts) - entropy_G).clamp(min=0) * (share_G > 0)
        return lacking_G.sum() / (share_G > 0).sum().clamp(min=1)
