"""Top-k token choice with variants: Mixtral, OLMoE, and a frozen random gate.

A linear gate gives logits for each token; the token goes to the k experts with the highest logits, weighted by a
softmax taken before or after the selection. Each variant is one class with its own defaults.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="before: p = softmax(W x), w = p_top-k (/ Σ);   after: w = softmax((W x)_top-k);   y = Σ_i w_i E_i(x)",
        paper="arXiv:1701.06538, eq. 3 and 5, without the noise",
        use="As the reference for learned routers: k, the order of softmax and selection, and the normalisation can "
        "be varied.",
        beware="It collapses without a balance loss. Without renormalisation the weights sum to less than 1 and the "
        "scale of the output depends on the router's confidence.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class TopK(Router["TopK.Config"]):
    """Send each token to the k experts with the highest logits.

    softmax=after is Mixtral's form and equals softmax=before with renormalise=true. softmax=before without
    renormalisation is OLMoE's form: the weights sum to less than 1, so the output scales with the router's confidence.
    At k=1 a renormalised weight is always 1 and the router would get no gradient from the task loss, so this is
    refused.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of top-k."""

        name: str = "top_k"
        top_k: int = 2
        """Experts per token."""
        softmax: Literal["before", "after"] = "before"
        """Take the softmax over all experts before the selection, or over the selected experts after it."""
        renormalise: bool = True
        """Divide the k weights by their sum (softmax=before only; with softmax=after they already sum to 1)."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k
        self.softmax = config.softmax
        self.renormalise = config.renormalise

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        always_one = config.softmax == "after" or config.renormalise
        why = "at 1 a renormalised weight is always 1; use softmax=before renormalise=false, or switch"
        check_top_k(config.top_k, num_experts, smallest=2 if always_one and num_experts > 1 else 1, why=why)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        weights: Literal["scores", "shares", "softmax"] = "shares" if self.renormalise else "scores"
        if self.softmax == "after":
            weights = "softmax"
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=self.top_k, weights=weights))
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="w = softmax((W x)_top-2),  y = Σ_i w_i E_i(x)",
        paper="arXiv:2401.04088, section 2.1",
        use="For top-2 as in Mixtral, dropless: the usual reference among open models.",
        beware="Weights sum to 1 even if the router is uncertain. The balance loss used to train the released model is "
        "not published.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
    )
)
class Mixtral(TopK):
    """Mixtral's router: the two best of 8 experts, with a softmax over these two.

    The loss coefficient is that of the released 8x7B configuration, 0.02, times k, because the loss there is k at
    uniform routing and 1 here. (The library's default is 0.001, and it takes the loss over all layers at once; here
    every layer has its own.)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k with Mixtral's defaults."""

        name: str = "mixtral"
        softmax: Literal["before", "after"] = "after"
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.04})


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  w = p_top-8,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2409.02060, section 2",
        use="With many narrow experts, 8 per token, dropless.",
        beware="It is designed for 64 experts: with 8 experts every token uses all of them. Weights sum to less than "
        "1.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
    )
)
class OLMoE(TopK):
    """OLMoE's router: the 8 best of 64 experts without renormalisation, with load-balance loss and z-loss."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k with OLMoE's defaults."""

        name: str = "olmoe"
        top_k: int = 8
        renormalise: bool = False
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "z": 0.001})


@ROUTERS.register(
    Facts(
        family="static",
        equation="w = softmax((W x)_top-k) with W random and frozen,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2303.01610, section 3.2 (SMoE-Dropout)",
        use="As a control: routing depends on the token, but is not learned.",
        beware="Loads stay as uneven as the random gate makes them.",
        causality=Causality(causal=True, reason="as top_k", batch_dependent=False),
        learned=False,
    )
)
class FrozenTopK(TopK):
    """Top-k with a random gate that is never trained: separates routing by content from learning to route.

    In SMoE-Dropout k grows during training; here it is constant.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopK.Config):
        """Options of top_k; without losses, which could train nothing."""

        name: str = "frozen_top_k"
        losses: dict[str, float] = field(default_factory=dict)

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate.requires_grad_(False)
