"""Gumbel straight-through: top-1 sampling with weight 1 and the gradient of the Gumbel-softmax (arXiv:1611.01144).

Gumbel noise is added to the logits and the token goes to the argmax. The forward weight is exactly 1; the backward pass
is that of the softmax of the noisy logits at temperature τ.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, uniform_to_gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="stochastic",
        equation="g = softmax((W x + Gumbel) / τ),  i = argmax_e g_e,  w = 1 + g_i - stop(g_i),  y = w E_i(x)",
        paper="arXiv:1611.01144, section 2.2; as a router: arXiv:2306.03745, section 4",
        use="For top-1 with a gradient to the logits of all experts, and exploration by sampling.",
        beware="The gradient is biased, most at high temperature, and its variance grows as the temperature falls. "
        "Loads are not balanced unless a loss is set.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
    )
)
class Gumbel(Router["Gumbel.Config"]):
    """Top-1 by straight-through Gumbel-softmax (Jang, Gu and Poole 2017), as compared in SMEAR (arXiv:2306.03745).

    The weight is exactly 1, so the output does not reflect confidence. The gradient is biased by the gap between the
    one-hot selection and its relaxation, which closes as τ falls. The schedule is that of Jang et al. No noise in
    evaluation.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Gumbel straight-through routing."""

        name: str = "gumbel"
        temperature: float = 1.0
        """Initial temperature τ."""
        final_temperature: float = 0.5
        """Lower bound of the temperature."""
        anneal_rate: float = 1e-4
        """The temperature is multiplied by exp(-rate) per step."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        final, rate = config.final_temperature, config.anneal_rate
        require(final > 0, "router.final_temperature", final, "greater than 0")
        require(config.temperature >= final, "router.temperature", config.temperature, f"at least {final:g}, the final")
        require(rate >= 0, "router.anneal_rate", rate, "at least 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        noise_TE = uniform_to_gumbel(ctx.uniform(*logits_TE.shape)) if ctx.training else 0.0
        noisy_TE = logits_TE + noise_TE
        expert_TK = rank_top_k(noisy_TE, 1)
        chosen_TK = (noisy_TE / self._temperature(ctx.step)).softmax(-1).gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK,
            1 + (chosen_TK - chosen_TK.detach()),  # exactly 1, with the gradient of g_i
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=logits_TE.softmax(-1),
        )

    def _temperature(self, step: int) -> Tensor:
        """Return the temperature, []: a tensor, since a compiled graph would be made again for each other number."""
        options = self.options
        decay = torch.full((), -options.anneal_rate * step, dtype=torch.float64).exp()
        return (options.temperature * decay).clamp(min=options.final_temperature)
