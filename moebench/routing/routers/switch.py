"""Switch: each token goes to its one best expert, scaled by the router's confidence."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, gumbel, jitter
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  i = argmax_e p_e,  y = p_i · E_i(x)",
        paper="arXiv:2101.03961, section 2.1",
        use="The simplest learned router: one expert per token, least compute and communication.",
        beware="Collapses without its balance loss. With a capacity, late tokens are dropped first. Routing in "
        "half precision has been seen to diverge; here it is fp32.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class Switch(Router["Switch.Config"]):
    """Top-1 token choice (Fedus, Zoph and Shazeer 2021).

    The weight is the raw probability p_i: renormalised over one expert it would be 1, and the task loss could
    not reach the router. The paper's capacity factors are 1.25 in training and 2.0 in evaluation; here the
    layout sets them, dropless by default. The ways to explore are those of its published code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Switch."""

        name: str = "switch"
        exploration: Literal["argmax", "input_jitter", "input_dropout", "sample"] = "input_jitter"
        """How training explores: not at all, by noise on the router's input (the experts' input has none), or by
        drawing the expert from p."""
        jitter: float = 0.01
        """In training the router's input is multiplied by U(1 - jitter, 1 + jitter) (exploration=input_jitter)."""
        dropout: float = 0.1
        """Share of the router's input that is set to 0 in training (exploration=input_dropout)."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.options = config

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a jitter that can turn signs, and a dropout of everything."""
        require(0 <= config.jitter < 1, "router.jitter", config.jitter, "at least 0 and below 1")
        require(0 <= config.dropout < 1, "router.dropout", config.dropout, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert with the highest probability, or in training to one drawn from all."""
        explores = self.options.exploration if ctx.training else "argmax"
        if explores == "input_jitter":
            x_TD = jitter(x_TD, self.options.jitter, ctx)
        elif explores == "input_dropout":
            kept_TD = ctx.uniform(*x_TD.shape) >= self.options.dropout
            x_TD = x_TD * kept_TD / (1 - self.options.dropout)
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ranked_TE = logits_TE.detach()
        if explores == "sample":
            ranked_TE = ranked_TE + gumbel(ctx.uniform(*logits_TE.shape))
        expert_TK = rank_top_k(ranked_TE, 1)
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(-1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
