"""Top-k token choice: softmax before or after the selection, renormalised or not."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="before: p = softmax(W x), w = p_top-k (/ Σ);   after: w = softmax((W x)_top-k);   y = Σ_i w_i E_i(x)",
        paper="arXiv:1701.06538, eq. 3 and 5, without the noise",
        use="The plain reference of all learned routers: vary k, the order of softmax and choice, the normalisation.",
        beware="Collapses without a balance loss. Not normalised, weights sum to less than 1 and the output "
        "depends on confidence.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class TopK(Router["TopK.Config"]):
    """Each token goes to its k best experts.

    softmax=after is Mixtral's form and equals softmax=before with renormalise=true. softmax=before without
    renormalisation is OLMoE's: the weights sum to less than 1, so the output scales with the confidence.
    At k=1 a renormalised weight is always 1 and the task loss cannot reach the router: refused.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of top-k."""

        name: str = "top_k"
        top_k: int = 2
        """Experts per token."""
        softmax: Literal["before", "after"] = "before"
        """Softmax over all experts before the selection, or over the selected ones after it."""
        renormalise: bool = True
        """Divide the k weights by their sum (softmax=before; with softmax=after they already sum to 1)."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k
        self.softmax = config.softmax
        self.renormalise = config.renormalise

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E, and k=1 with weights that are always 1."""
        always_one = config.softmax == "after" or config.renormalise
        why = "at 1 a renormalised weight is always 1; use softmax=before renormalise=false, or switch"
        check_top_k(config.top_k, num_experts, smallest=2 if always_one and num_experts > 1 else 1, why=why)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its k experts with the highest logits."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, self.top_k)
        if self.softmax == "after":
            weight_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        else:
            weight_TK = scores_TE.gather(-1, expert_TK)
            if self.renormalise:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="w = softmax((W x)_top-2),  y = Σ_i w_i E_i(x)",
        paper="arXiv:2401.04088, section 2.1",
        use="Top-2 as in Mixtral, dropless: what most open models compare with.",
        beware="Weights sum to 1 however unsure the gate is. With what balance loss the released model was trained is "
        "not published.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
    )
)
class Mixtral(TopK):
    """Mixtral's router: the two best of 8 experts, softmax over these two.

    The coefficient is that of the released 8x7B model's configuration, 0.02, times k: there the loss is k at uniform,
    here 1. (The library's own default is 0.001. There the loss is also taken over all layers as one; here it is per
    layer, as for every router.)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k with the defaults of Mixtral."""

        name: str = "mixtral"
        softmax: Literal["before", "after"] = "after"
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.04})


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  w = p_top-8,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2409.02060, section 2",
        use="Many narrow experts, 8 for each token, dropless.",
        beware="Meant for 64 experts: with 8 it is a soft mixture of all. Weights sum to less than 1.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
    )
)
class OLMoE(TopK):
    """OLMoE's router: the 8 best of 64 experts without renormalisation, with balance and z-loss."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k with the defaults of OLMoE."""

        name: str = "olmoe"
        top_k: int = 8
        renormalise: bool = False
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "z": 0.001})


@ROUTERS.register(
    Facts(
        family="static",
        equation="w = softmax((W x)_top-k) with W drawn once and never trained,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2303.01610, section 3.2 (SMoE-Dropout)",
        use="A control: routing by content, of which nothing is learned.",
        beware="Loads stay as the random gate makes them: nothing can even them out.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
        learned=False,
    )
)
class FrozenTopK(TopK):
    """A random gate that is never trained: what of a learned router is looking at the token, and what is learning.

    SMoE-Dropout lets k grow during training; here it stays.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k; no loss, since nothing could follow it."""

        name: str = "frozen_top_k"
        losses: dict[str, float] = field(default_factory=dict)

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate.requires_grad_(False)
