"""Dense-to-sparse gate of EvoMoE: Gumbel-softmax over all experts with a falling temperature, then top-1.

Paper: arXiv:2112.14397. In the dense phase a token uses every expert whose Gumbel-softmax share exceeds a threshold; as
the temperature falls, fewer do. After it each token uses one expert, weighted by its softmax probability.
"""

from dataclasses import dataclass, field
from typing import Literal

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
        family="adaptive computation",
        equation="g = softmax((W x + Gumbel) / τ),  y = Σ_{e: g_e > θ} g_e E_e(x),  τ falls;  later i ~ p = softmax(W "
        "x),  y = p_i E_i(x);  in evaluation i = argmax_e p_e",
        paper="arXiv:2112.14397, section 3.3 (DTS-Gate of EvoMoE)",
        use="When early routing decisions are a concern: all experts learn before the router becomes sparse.",
        beware="The dense phase costs up to E times as much, which the cost of matched arms does not count. If the "
        "temperature falls too fast, decisions are as early as without it.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
        variable_k=True,
    )
)
class DenseToSparse(Router["DenseToSparse.Config"]):
    """The dense-to-sparse gate of EvoMoE (Nie et al. 2021): all experts learn first, then routing becomes sparse.

    After the dense phase training samples one expert from the softmax, as EvoMoE's released code does
    (`hard_phase=sample`); evaluation takes the most probable one. EvoMoE's first phase (train one expert and copy it)
    initialises experts, is not part of routing, and is left out. The default length of the dense phase is ours: the
    paper's runs are far longer. Training is dense at first, which the cost of a matched arm does not count.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of dense-to-sparse routing."""

        name: str = "dense_to_sparse"
        temperature: float = 2.0
        """Initial temperature τ."""
        final_temperature: float = 0.3
        """Temperature at the end of the dense phase, reached linearly."""
        dense_steps: int = 1000
        """Number of steps of the dense phase."""
        threshold: float = 0.001
        """Experts with g below this θ are left out; the best one never is."""
        weights: Literal["relaxed", "softmax"] = "relaxed"
        """Weights in the dense phase: relaxed uses g (the paper's equation), softmax uses softmax(W x) of the same
        experts (the released code's default). After it the weight is always that of the softmax."""
        hard_phase: Literal["sample", "argmax"] = "sample"
        """After the dense phase training samples the expert from the softmax, or takes the most probable one."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        final = config.final_temperature
        require(final > 0, "router.final_temperature", final, "greater than 0")
        require(config.temperature >= final, "router.temperature", config.temperature, f"at least {final:g}, the final")
        require(config.dense_steps >= 0, "router.dense_steps", config.dense_steps, "at least 0")
        require(0 <= config.threshold < 1, "router.threshold", config.threshold, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        is_dense = ctx.training and ctx.step < self.options.dense_steps
        samples = is_dense or (ctx.training and self.options.hard_phase == "sample")
        ranked_TE = logits_TE + uniform_to_gumbel(ctx.uniform(*logits_TE.shape)) if samples else logits_TE
        best_TK = rank_top_k(ranked_TE, 1)
        if not is_dense:
            weight_TK = scores_TE.gather(-1, best_TK)
            return Routing.from_top_k(
                best_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
            )
        share_TE = (ranked_TE / self._temperature(ctx.step)).softmax(-1)
        best_TE = torch.zeros_like(share_TE, dtype=torch.bool).scatter(-1, best_TK, True)
        weight_TE = share_TE if self.options.weights == "relaxed" else scores_TE
        chosen_TE = best_TE | (share_TE > self.options.threshold)
        return Routing.from_table(weight_TE, chosen_TE, logits_TE=logits_TE, scores_TE=share_TE)

    def _temperature(self, step: int) -> float:
        options = self.options
        return options.temperature + (options.final_temperature - options.temperature) * step / options.dense_steps
