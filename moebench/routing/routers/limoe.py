"""LIMoE: V-MoE with top-1 and entropy losses that keep every modality spread over experts (arXiv:2206.02770).

Routing is V-MoE's with one expert per token. A local entropy loss makes each token's choice confident; a global entropy
loss for each modality keeps its tokens from all using the same few experts.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.v_moe import VMoE
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x + noise),  y = p_i · E_i(x), i = argmax p;  losses mean_t H(p_t) and, for each"
        " domain d, max(0, ln S - H(mean_{t∈d} p_t))",
        paper="arXiv:2206.02770, section 2.2 (entropy losses)",
        use="With several modalities or domains in one model: it keeps the tokens of a small one from sharing a "
        "single expert.",
        beware="The threshold applies to each domain: if it asks for more experts than a domain needs, these become "
        "alike. Batch priority depends on the whole batch.",
        causality=Causality(
            causal=True,
            reason="dropless, each token is routed by its own vector and its own noise",
            batch_dependent=False,
            with_capacity=False,  # batch prioritized routing
        ),
        own_losses=("score_importance", "load", "domain_entropy"),
    )
)
class LIMoE(VMoE):
    """Top-1, batch prioritized, with local and global entropy losses (Mustafa et al. 2022).

    A balance loss over all tokens is satisfied when each modality has one expert of its own; the global entropy of each
    modality is not, until its tokens use S experts. Here a modality is a domain of the task; a task without domains
    counts as one. The paper applies both entropy losses to text only, whose tokens are few beside those of images; here
    they apply to all domains. The coefficient 0.04 was found for images with text and is a starting point. Its code is
    not public: the other coefficients, and priority in evaluation only, are V-MoE's.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(VMoE.Config):
        """Options of LIMoE."""

        name: str = "limoe"
        top_k: int = 1
        """Experts per token."""
        least_experts: int | None = None
        """S: a domain spread as evenly as over S experts has no loss; null: all experts."""
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
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        super().check(config, num_experts)
        least = config.least_experts
        is_valid = least is None or 1 <= least <= num_experts
        require(is_valid, "router.least_experts", least, f"null or from 1 to layout.num_experts={num_experts}")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        routing = super().forward(x_TD, ctx)
        domain_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
        domain_T = domain_T if ctx.domain_T is None else ctx.domain_T
        return replace(routing, token_extras={"domain_T": domain_T})

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        return {**super().losses(record), "domain_entropy": self._domain_entropy(record)}

    def _domain_entropy(self, record: LayerRecord) -> LossValue:
        """Return the mean over domains of max(0, ln S - H): 0 if spread over S experts, ln S with one expert each."""
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        in_domain_TG = functional.one_hot(record.routing.token_extras["domain_T"], self.num_domains).to(logits_TE.dtype)
        if record.valid_T is not None:
            in_domain_TG = in_domain_TG * record.valid_T.unsqueeze(-1)
        return reduce_record(record, self._average_deficits, totals=[in_domain_TG.T @ logits_TE.softmax(-1)])

    def _average_deficits(self, sum_GE: Tensor) -> Tensor:
        num_tokens_G = sum_GE.sum(-1)  # a domain that does not occur is left out of the mean
        mean_GE = sum_GE / num_tokens_G.clamp(min=1).unsqueeze(-1)
        entropy_G = -(mean_GE * mean_GE.clamp(min=1e-20).log()).sum(-1)
        deficit_G = (math.log(self.least_experts) - entropy_G).clamp(min=0) * (num_tokens_G > 0)
        return deficit_G.sum() / (num_tokens_G > 0).sum().clamp(min=1)
