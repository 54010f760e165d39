"""Switch Transformer: top-1 token choice, weighted by the router probability (arXiv:2101.03961).

A linear gate gives each token a probability for every expert. The token goes to the most probable expert, and the
expert's output is multiplied by that probability, through which the task loss trains the gate. A load-balance loss
keeps tokens from collapsing onto few experts.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, jitter, uniform_to_gumbel
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  i = argmax_e p_e,  y = p_i · E_i(x)",
        paper="arXiv:2101.03961, section 2.1",
        use="As the simplest learned router: one expert per token, with the least compute and communication.",
        beware="It collapses without its balance loss. With a capacity, late tokens are dropped first. Routing in "
        "half precision has been seen to diverge; here it is computed in fp32.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class Switch(Router["Switch.Config"]):
    """Top-1 token choice (Fedus, Zoph and Shazeer 2021).

    The weight is the probability p_i itself: renormalised over one expert it would always be 1, and the router would
    get no gradient from the task loss. The paper uses capacity factors of 1.25 in training and 2.0 in evaluation; here
    the layout sets the capacity, and by default no token is dropped. The exploration options are those of the published
    code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Switch."""

        name: str = "switch"
        exploration: Literal["argmax", "input_jitter", "input_dropout", "sample"] = "input_jitter"
        """Exploration in training: none (argmax), multiplicative or dropout noise on the router's input (the experts
        see the input without noise), or sampling the expert from p."""
        jitter: float = 0.01
        """In training the router's input is multiplied by U(1 - jitter, 1 + jitter) (exploration=input_jitter)."""
        dropout: float = 0.1
        """Fraction of the router's input that is set to 0 in training (exploration=input_dropout)."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.options = config

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(0 <= config.jitter < 1, "router.jitter", config.jitter, "at least 0 and below 1")
        require(0 <= config.dropout < 1, "router.dropout", config.dropout, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        exploration = self.options.exploration if ctx.training else "argmax"
        if exploration == "input_jitter":
            x_TD = jitter(x_TD, self.options.jitter, ctx)
        elif exploration == "input_dropout":
            kept_TD = ctx.uniform(*x_TD.shape) >= self.options.dropout
            x_TD = x_TD * kept_TD / (1 - self.options.dropout)
        logits_TE = self.gate(x_TD)
        noisy_TE = None
        if exploration == "sample":
            noisy_TE = logits_TE.detach() + uniform_to_gumbel(ctx.uniform(*logits_TE.shape))
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=1), ranked_TE=noisy_TE)
        return Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
