"""PonderNet: after each step a token halts with a learned probability, regularised by a geometric prior.

Paper: arXiv:2107.05407. In training the number of steps is sampled from the halting distribution; evaluation takes its
median. The output is the state at the halting step, and a KL loss keeps the distribution near a geometric prior.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.constants import build_constant_like
from moebench.routing.context import RouteContext
from moebench.routing.halting import HaltingRouter, exclusive_cumsum
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig
from moebench.routing.values import ChainRouting, LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="h_n = h_{n-1} + E_n(|h_{n-1}|),  λ_n = sigmoid(w·|h_n| + b),  p_n = λ_n Π_{j<n} (1-λ_j),  λ_E = 1;  "
        "training: N ~ p, evaluation: N = min {n: Σ_{j≤n} p_j ≥ 1/2};  y = h_N - x",
        paper="arXiv:2107.05407, section 2",
        use="For adaptive computation with a prior over the number of steps instead of a cost per step.",
        beware="The number of steps is sampled, so its gradient is noisy. Steps are sequential, so it is slow.",
        causality=Causality(causal=True, reason="each token halts by its own states and draws", batch_dependent=False),
        variable_k=True,
        budget=Knob(attribute="halting_shift", low=-50.0, high=50.0, unit=-1.0),
        cost="steps·T",
        trained_by_own_loss=("bias", "gate"),  # the output has weight 1: only `objective` and the loss train them
        makes_scores=False,
        own_losses=("geometric",),
    )
)
class PonderNet(HaltingRouter):
    """PonderNet (Banino et al. 2021) over a chain: the experts of a layer are the steps.

    The paper runs all steps and minimises Σ_n p_n L_n + β KL(p || geometric). A layer inside a model cannot know L_n,
    so N is sampled and each token runs its own steps only (|h| is h divided by its root mean square; E_1 reads x
    itself). The gradient estimates the paper's: through the state of the sampled step, and through log p_N times the
    token's loss minus the batch mean (`objective`). It is unbiased for the effect of a token's steps on its own loss
    (up to 1/T, its own part of the baseline); effects on later tokens through attention are not credited.

    The loss `geometric` is the KL divergence to the prior truncated at E steps, 0 when p is the prior: KL(p || g) = Σ_n
    S_n · KL(λ_n || γ_n), with S_n the probability to reach step n. It is estimated without bias from the steps that are
    reached: each counts with weight 1, written as S_n divided by its detached value so that the gradient of S_n is
    included.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of PonderNet."""

        name: str = "ponder_net"
        prior: float = 0.2
        """Halting probability λ_p per step under the prior, also the initial one; the width of experts is matched for
        its mean number of steps."""
        losses: dict[str, float] = field(default_factory=lambda: {"geometric": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context, math.log(config.prior / (1 - config.prior)))
        self.prior = config.prior

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return round(compute_mean_steps(config.prior, num_experts))

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        super().check(config, num_experts)
        require(0 < config.prior < 1, "router.prior", config.prior, "greater than 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        threshold_T = ctx.uniform(x_TD.shape[0]) if ctx.training else x_TD.new_full((x_TD.shape[0],), 0.5)

        def continues(logits_TN: Tensor) -> Tensor:
            return -functional.logsigmoid(-logits_TN).sum(-1).expm1() < threshold_T

        logits_TN, ran_TE, last_TE = self.run_chain(x_TD, ctx, continues)
        extras = {"logits_T": logits_TN, "ran_T": ran_TE, "last_T": last_TE}
        return ChainRouting.from_table(last_TE.float(), ran_TE, token_extras=extras)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        logits_TN, ran_TE = record.routing.token_extras["logits_T"], record.routing.token_extras["ran_T"]
        stop_TN, continue_TN = functional.logsigmoid(logits_TN), functional.logsigmoid(-logits_TN)
        prior_N = build_constant_like(compute_hazards(self.prior, self.num_experts)[:-1], logits_TN)
        kl_TN = stop_TN.exp() * (stop_TN - prior_N.log()) + continue_TN.exp() * (continue_TN - (-prior_N).log1p())
        reach_TN = exclusive_cumsum(continue_TN)[:, :-1]
        kl_TN = kl_TN * (reach_TN - reach_TN.detach()).exp() * ran_TE[:, :-1]
        # The clamp, because rounding can make it negative.
        return {"geometric": reduce_record(record, lambda mean: mean.clamp(min=0), means=[kl_TN.sum(-1)])}

    @override
    def objective(self, record: LayerRecord) -> Tensor:
        assert record.token_loss_T is not None, "the record has no task loss yet"
        loss_T = record.token_loss_T.float()
        extras = record.routing.token_extras
        logits_TN, last_TN = extras["logits_T"], extras["last_T"][:, :-1]
        continued_TN = extras["ran_T"][:, :-1] & ~last_TN
        log_p_TN = functional.logsigmoid(logits_TN) * last_TN + functional.logsigmoid(-logits_TN) * continued_TN
        return (loss_T - record.mean(loss_T)) * log_p_TN.sum(-1)

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        return compute_mean_steps(self.prior, self.num_experts)


def compute_hazards(prior: float, num_steps: int) -> list[float]:
    """Return γ_1 ... γ_E: the probability to halt at a step once it is reached, under the truncated prior."""
    return [prior / -math.expm1((num_steps - step) * math.log1p(-prior)) for step in range(num_steps)]


def compute_mean_steps(prior: float, num_steps: int) -> float:
    """Return the mean of the geometric prior truncated at E steps: the summed probabilities to reach each step."""
    reach = [1.0]
    for hazard in compute_hazards(prior, num_steps)[:-1]:
        reach.append(reach[-1] * (1 - hazard))
    return math.fsum(reach)
