"""Expert threshold: expert choice made causal, each expert takes whatever scores above its learned threshold."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.histogram import count_by_expert, empty_counts, value_below_top
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="t goes to e where r_te = w_e·x_t > θ_e,  θ_e ← β θ_e + (1-β) · quantile_{1-k/E}(r_·e);  "
        "y = Σ sigmoid(r_te) E_e(x_t)",
        paper="arXiv:2603.11535",
        use="The gain of expert choice in a language model: every token is judged on its own.",
        beware="Many tokens get no expert, so a shared expert is wise. Thresholds lag behind when the data "
        "change, and loads are even on average only.",
        causality=Causality(
            causal=True,
            reason="thresholds come from past steps, and each token is compared with them on its own",
            batch_dependent=False,
        ),
        variable_k=True,
    )
)
class ExpertThreshold(Router["ExpertThreshold.Config"]):
    """Each expert takes the share k/E of tokens that it scores highest, measured over past batches.

    The number of experts of a token varies, none included (a shared expert helps there). Thresholds are a moving
    average of the quantiles of whole batches, updated once per step. The paper begins with some thousand steps of
    plain expert choice, which look ahead; here thresholds begin at the quantile that logits have at the start, of
    normalised inputs and the gate as it is drawn. Quantiles are read from a histogram of r - θ, whose counts add up
    over processes.
    """

    threshold_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of expert threshold."""

        name: str = "expert_threshold"
        average_experts: int = 2
        """Experts per token on average (k) that the thresholds aim at."""
        decay: float = 0.9
        """Weight of the past in the moving average of thresholds (β)."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.share = config.average_experts / context.num_experts
        self.decay = config.decay
        start = -torch.inf if self.share == 1 else self.gate.start_std * NormalDist().inv_cdf(1 - self.share)
        self.register_buffer("threshold_E", torch.full((context.num_experts,), start))

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k, the average."""
        return config.average_experts

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and a decay that forgets or keeps all."""
        check_top_k(config.average_experts, num_experts, key="average_experts")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to every expert whose threshold it passes."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_TK = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        routing = Routing.from_top_k(
            expert_TK, scores_TE, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
        above_N = (logits_TE > self.threshold_E).reshape(-1)
        return routing.keep(above_N).compact()  # a hole would keep a place that rerouting may need

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return for each expert how many logits were how far above its threshold: a histogram, int64 [E, bins]."""
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        if self.share == 1:  # everything passes
            return {"above_EH": empty_counts(self.num_experts, logits_TE.device)}
        return {"above_EH": count_by_expert(logits_TE.detach() - self.threshold_E, record.valid_T)}

    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Move each threshold towards the quantile that lets the share k/E of the step's tokens through."""
        above_EH = statistics["above_EH"]
        if not above_EH.any():
            return  # everything passes; or a step without tokens
        moved_E = value_below_top(above_EH, self.share * above_EH.sum(-1))
        self.threshold_E.add_(moved_E.to(self.threshold_E.dtype), alpha=1 - self.decay)
