"""ACT: a token goes from expert to expert until its halting probabilities add up to 1."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.halting import HaltingRouter, before
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig
from moebench.routing.values import ChainRouting, LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="h_n = h_{n-1} + E_n(|h_{n-1}|),  p_n = sigmoid(w·|h_n| + b),  N = min {n: Σ_{j≤n} p_j > 1-ε},  "
        "R = 1 - Σ_{j<N} p_j,  y = Σ_{n<N} p_n h_n + R h_N - x",
        paper="arXiv:1603.08983, halting at each position as in arXiv:1807.03819",
        use="Tokens that think as long as they need, with a price on every step.",
        beware="The price decides almost everything and must be tuned. Steps are computed one after another, "
        "so it is slow.",
        causality=Causality(causal=True, reason="each token stops by its own states", batch_dependent=False),
        variable_k=True,
        cost="steps·T",
        makes_scores=False,
        own_losses=("ponder",),
    )
)
class ACT(HaltingRouter):
    """Adaptive computation time (Graves 2016) over a chain: the experts of a layer are the steps.

    The paper and the Universal Transformer repeat one network; here each step is an expert of its own, and attention
    stands outside. |h| is h over its root mean square, for E_1 x as it is. The loss `ponder` is the mean of N + R, at
    least 1: N counts the steps and has no gradient, which goes through R alone. x is taken off because the residual
    stream outside adds it again. FLOPs count `expected_steps`; the loads show how many a run takes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of ACT."""

        name: str = "act"
        bias: float = 1.0
        """Bias b at the start: at 1 a token takes two steps."""
        epsilon: float = 0.01
        """How far below 1 the sum may stay, so that one step can be enough."""
        expected_steps: float = 2.0
        """Steps of a token by which the width of experts is matched (at most E); says nothing about the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"ponder": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context, config.bias)
        self.threshold = 1 - config.epsilon
        self.expected_steps = config.expected_steps

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return the expected steps to the nearest integer."""
        return round(min(config.expected_steps, num_experts))

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse an epsilon that is no part of 1, and less than one step."""
        super().check(config, num_experts)
        require(0 < config.epsilon < 1, "router.epsilon", config.epsilon, "greater than 0 and below 1")
        require(config.expected_steps >= 1, "router.expected_steps", config.expected_steps, "at least 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Walk on until the sum is reached; the last step weighs what is left."""
        logits_TN, ran_TE, last_TE = self.walk(x_TD, ctx, lambda z_TN: z_TN.sigmoid().sum(-1) <= self.threshold)
        halting_TN = logits_TN.sigmoid()
        left_TE = 1 - before(halting_TN)
        weight_TE = left_TE.where(last_TE, functional.pad(halting_TN, (0, 1)))
        remainder_T = left_TE.where(last_TE, 0.0).sum(-1)
        return ChainRouting.from_table(weight_TE, ran_TE, token_extras={"remainder_T": remainder_T})

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the mean of N + R."""
        remainder_T = record.routing.token_extras["remainder_T"]
        return {"ponder": record.mean(record.routing.experts_per_token_T.to(remainder_T.dtype) + remainder_T)}

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return the expected steps."""
        return min(self.expected_steps, self.num_experts)
