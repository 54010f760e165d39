"""PonderNet: after each step a token stops with a learned probability, and a geometric prior says how many it takes."""

import math
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
        equation="h_n = h_{n-1} + E_n(|h_{n-1}|),  λ_n = sigmoid(w·|h_n| + b),  p_n = λ_n Π_{j<n} (1-λ_j),  λ_E = 1;  "
        "training: N ~ p, evaluation: N = min {n: Σ_{j≤n} p_j ≥ 1/2};  y = h_N - x",
        paper="arXiv:2107.05407, section 2",
        use="Thinking time as a distribution with a prior in place of a price.",
        beware="The number of steps is drawn, so its gradient is noisy. Steps are computed one after another.",
        causality=Causality(causal=True, reason="each token stops by its own states and draws", batch_dependent=False),
        variable_k=True,
        cost="steps·T",
        trained_by_own_loss=("bias", "gate"),  # the chosen step weighs 1: `objective` and the own loss teach them
        makes_scores=False,
        own_losses=("geometric",),
    )
)
class PonderNet(HaltingRouter):
    """PonderNet (Banino et al. 2021) over a chain: the experts of a layer are the steps.

    The paper runs all steps and minimises Σ_n p_n L_n + β KL(p || geometric). A layer in the middle of a model cannot
    know L_n, so N is drawn and each token runs its own steps alone (|h| is h over its root mean square, for E_1 x as it
    is). The gradient estimates the paper's: through the state of the drawn step, and by `objective` through log p_N
    times the token's loss minus the mean loss of the batch, a baseline. Unbiased for what a token's steps do to its own
    loss (but for 1/T, its own part in the baseline); what they do to later tokens through attention is not credited to
    them. `geometric` is the KL to the prior cut at E steps and normalised, 0 when p is the prior: KL(p || g) =
    Σ_n S_n · KL(λ_n || γ_n), with S_n the probability to reach step n, estimated without bias by the steps that are
    reached. Evaluation takes the median step of p: nothing is drawn.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of PonderNet."""

        name: str = "ponder_net"
        prior: float = 0.2
        """Probability λ_p to stop after each step under the prior, and at the start; widths match its mean steps."""
        losses: dict[str, float] = field(default_factory=lambda: {"geometric": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context, math.log(config.prior / (1 - config.prior)))
        self.prior = config.prior

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return the mean steps under the prior to the nearest integer."""
        return round(compute_mean_steps(config.prior, num_experts))

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a prior that always or never stops."""
        super().check(config, num_experts)
        require(0 < config.prior < 1, "router.prior", config.prior, "greater than 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Walk on until the cumulative probability reaches a draw, in evaluation one half."""
        threshold_T = ctx.uniform(x_TD.shape[0]) if ctx.training else x_TD.new_full((x_TD.shape[0],), 0.5)

        def goes_on(logits_TN: Tensor) -> Tensor:
            return -functional.logsigmoid(-logits_TN).sum(-1).expm1() < threshold_T

        logits_TN, ran_TE, last_TE = self.walk(x_TD, ctx, goes_on)
        extras = {"logits_T": logits_TN, "ran_T": ran_TE, "last_T": last_TE}
        return ChainRouting.from_table(last_TE.float(), ran_TE, token_extras=extras)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the estimate of KL(p || prior): of each reached step the KL of its decision, weighed by 1.

        S_n over itself without gradient is that 1: with it the gradient of S_n counts too, and is unbiased.
        """
        logits_TN, ran_TE = record.routing.token_extras["logits_T"], record.routing.token_extras["ran_T"]
        stop_TN, stay_TN = functional.logsigmoid(logits_TN), functional.logsigmoid(-logits_TN)
        prior_N = logits_TN.new_tensor(compute_hazards(self.prior, self.num_experts)[:-1])
        kl_TN = stop_TN.exp() * (stop_TN - prior_N.log()) + stay_TN.exp() * (stay_TN - (-prior_N).log1p())
        reach_TN = before(stay_TN)[:, :-1]
        kl_TN = kl_TN * (reach_TN - reach_TN.detach()).exp() * ran_TE[:, :-1]
        return {"geometric": record.mean(kl_TN.sum(-1)).clamp(min=0)}  # rounding may go below

    def objective(self, record: LayerRecord) -> Tensor:
        """Return (loss - mean loss) · log p_N of each token."""
        assert record.token_loss_T is not None, "the record has not been judged"
        loss_T = record.token_loss_T.float()
        extras = record.routing.token_extras
        logits_TN, last_TN = extras["logits_T"], extras["last_T"][:, :-1]
        passed_TN = extras["ran_T"][:, :-1] & ~last_TN
        log_p_TN = functional.logsigmoid(logits_TN) * last_TN + functional.logsigmoid(-logits_TN) * passed_TN
        return (loss_T - record.mean(loss_T)) * log_p_TN.sum(-1)

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return the mean steps under the prior."""
        return compute_mean_steps(self.prior, self.num_experts)


def compute_hazards(prior: float, num_steps: int) -> list[float]:
    """Return γ_1 ... γ_E: the probability to stop at a step once it is reached, under the prior cut at E steps."""
    return [prior / -math.expm1((num_steps - step) * math.log1p(-prior)) for step in range(num_steps)]


def compute_mean_steps(prior: float, num_steps: int) -> float:
    """Return the mean of the geometric prior cut at E steps: the sum of the probabilities to reach each step."""
    reached = [1.0]
    for hazard in compute_hazards(prior, num_steps)[:-1]:
        reached.append(reached[-1] * (1 - hazard))
    return math.fsum(reached)
