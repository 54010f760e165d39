"""Adaptive computation time (ACT): a token passes through a chain of experts until its halting probabilities sum to 1.

Papers: arXiv:1603.08983, arXiv:1807.03819. After each step a sigmoid unit gives a halting probability. The token stops
once the sum reaches 1 - ε; its output is the mean of its states, weighted by these probabilities and the remainder.
"""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.halting import HaltingRouter, exclusive_cumsum
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig
from moebench.routing.values import ChainRouting, LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="h_n = h_{n-1} + E_n(|h_{n-1}|),  p_n = sigmoid(w·|h_n| + b),  N = min {n: Σ_{j≤n} p_j > 1-ε},  "
        "R = 1 - Σ_{j<N} p_j,  y = Σ_{n<N} p_n h_n + R h_N - x",
        paper="arXiv:1603.08983, halting at each position as in arXiv:1807.03819",
        use="When tokens should compute for as many steps as they need, at a cost per step.",
        beware="The cost coefficient dominates the behaviour and must be tuned. Steps are sequential, so it is slow.",
        causality=Causality(causal=True, reason="each token halts by its own states", batch_dependent=False),
        variable_k=True,
        budget=Knob(attribute="halting_shift", low=-50.0, high=50.0, unit=-1.0),
        cost="steps·T",
        makes_scores=False,
        own_losses=("ponder",),
    )
)
class ACT(HaltingRouter):
    """Adaptive computation time (Graves 2016) over a chain: the experts of a layer are the steps.

    The paper and the Universal Transformer repeat one network; here each step is its own expert, and attention is
    not part of the step. |h| is h divided by its root mean square; E_1 reads x itself. The loss `ponder` is the mean of
    N + R, at least 1: the number of steps N has no gradient, the remainder R has. x is subtracted because the residual
    connection of the block adds it again. Planned FLOPs use `expected_steps`; the load metrics show the steps taken.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of ACT."""

        name: str = "act"
        bias: float = 1.0
        """Initial bias b of the halting unit; at 1 a token takes two steps."""
        epsilon: float = 0.01
        """Slack ε: the probabilities only have to sum to 1 - ε, so that one step can be enough."""
        expected_steps: float = 2.0
        """Steps per token for which the width of experts is matched (at most E); does not affect the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"ponder": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context, config.bias)
        self.threshold = 1 - config.epsilon
        self.expected_steps = config.expected_steps

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return round(min(config.expected_steps, num_experts))

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        super().check(config, num_experts)
        require(0 < config.epsilon < 1, "router.epsilon", config.epsilon, "greater than 0 and below 1")
        require(config.expected_steps >= 1, "router.expected_steps", config.expected_steps, "at least 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TN, ran_TE, last_TE = self.run_chain(x_TD, ctx, lambda z_TN: z_TN.sigmoid().sum(-1) <= self.threshold)
        halting_TN = logits_TN.sigmoid()
        remaining_TE = 1 - exclusive_cumsum(halting_TN)
        weight_TE = remaining_TE.where(last_TE, functional.pad(halting_TN, (0, 1)))
        remainder_T = remaining_TE.where(last_TE, 0.0).sum(-1)
        return ChainRouting.from_table(weight_TE, ran_TE, token_extras={"remainder_T": remainder_T})

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        remainder_T = record.routing.token_extras["remainder_T"]
        steps_T = record.routing.experts_per_token_T.to(remainder_T.dtype) + remainder_T
        return {"ponder": reduce_record(record, lambda mean: mean, means=[steps_T])}

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        return min(self.expected_steps, self.num_experts)
