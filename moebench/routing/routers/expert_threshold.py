"""Expert threshold: causal expert choice, in which an expert takes every token that scores above its threshold.

Paper: arXiv:2603.11535. After each step the threshold of an expert moves towards the (1 - k/E)-quantile of its scores,
so that it takes the share k/E of tokens on average. Tokens do not compete with each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.histogram import count_by_expert, empty_histograms, find_value_below_top
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.selection import select
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="t goes to e where r_te = w_e·x_t > θ_e,  θ_e ← β θ_e + (1-β) · quantile_{1-k/E}(r_·e);  "
        "y = Σ sigmoid(r_te) E_e(x_t)",
        paper="arXiv:2603.11535",
        use="For the benefits of expert choice in a language model: every token is routed independently.",
        beware="Many tokens get no expert, so a shared expert is advisable. Thresholds lag behind a change of the "
        "data, and loads are even on average only.",
        causality=Causality(
            causal=True,
            reason="thresholds come from past steps, and each token is compared with them independently",
            batch_dependent=False,
        ),
        variable_k=True,
        budget=Knob(attribute="threshold_shift", low=-50.0, high=50.0, unit=-0.5),
    )
)
class ExpertThreshold(Router["ExpertThreshold.Config"]):
    """Each expert takes the share k/E of tokens that it scores highest, as measured over past batches.

    The number of experts per token varies and may be 0 (a shared expert helps). Thresholds are a moving average of the
    quantiles of whole batches, updated once per step. The paper starts with some thousand steps of expert choice, which
    is not causal; here thresholds start at the quantile of the initial logits, assuming normalised inputs. Quantiles
    are read from histograms of r - θ, whose counts add up over micro-batches and processes.
    """

    threshold_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of expert threshold."""

        name: str = "expert_threshold"
        average_experts: int = 2
        """Average number k of experts per token that the thresholds aim at."""
        decay: float = 0.9
        """Decay β of the moving average of thresholds."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.share = config.average_experts / context.num_experts
        self.decay = config.decay
        self.threshold_shift = 0.0
        """Added to the thresholds of all experts."""
        logit_std = self.gate.initial_logit_std * context.width_ratio**-0.5
        initial_threshold = -torch.inf if self.share == 1 else logit_std * NormalDist().inv_cdf(1 - self.share)
        self.register_buffer("threshold_E", torch.full((context.num_experts,), initial_threshold))

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.average_experts

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.average_experts, num_experts, key="average_experts")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_TK = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        routing = Routing.from_top_k(
            expert_TK, scores_TE, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
        above_N = (logits_TE > self.threshold_E + self.threshold_shift).reshape(-1)
        return select(routing, above_N)

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        if self.share == 1:  # every token passes
            return {"above_EH": empty_histograms(self.num_experts, logits_TE.device)}
        return {"above_EH": count_by_expert(logits_TE.detach() - self.threshold_E, record.valid_T)}

    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        above_EH = statistics["above_EH"]
        shift_E = find_value_below_top(above_EH, self.share * above_EH.sum(-1))
        shift_E = shift_E.where(above_EH.any(), 0.0)  # without counts every token passes, or the step had no tokens
        self.threshold_E.add_(shift_E.to(self.threshold_E.dtype), alpha=1 - self.decay)
