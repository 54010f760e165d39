"""Loss-free balancing and DeepSeek-V3: a selection bias per expert follows the loads (arXiv:2408.15664, 2412.19437).

A bias is added to each expert's score for selecting the top k, and not to the weights. After each step the bias of an
overloaded expert decreases and that of an underloaded one increases, so no auxiliary loss disturbs the gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.group_limit import check_kept_groups, limit_to_groups
from moebench.routing.losses import recount_by_scores, sequence_balance
from moebench.routing.reduction import LossValue
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x),  I = top-k(s + b),  w = s_I,  after each step b += u · sign(mean load - load)",
        paper="arXiv:2408.15664, section 3 and algorithm 1",
        use="In language models where a balance loss costs quality: loads become even within some hundred steps, "
        "without a gradient.",
        beware="Balancing is slow at first, and at the end the bias keeps oscillating by its rate. Loads of a single "
        "batch are not bounded, so keep experts dropless.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector and a bias set by past batches only",
            batch_dependent=False,
        ),
        own_losses=("sequence_balance",),
    )
)
class LossFree(Router["LossFree.Config"]):
    """Top-k with a bias per expert for selection only (Wang et al. 2024).

    The bias follows the loads of whole optimizer steps over all processes: a bias from the current batch would leak
    future tokens, and one from a part of it would balance that part instead. Proportional updates use relative loads,
    (mean - load) / mean, so that the rate does not depend on the batch size as it does in the paper. `sequence_balance`
    is computed from the scores without bias, because the balanced loads would hide the imbalance. The paper's models
    use 6 experts per token; the default here is 2, as for `top_k`.
    """

    bias_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of loss-free balancing."""

        name: str = "loss_free"
        top_k: int = 2
        """Experts per token."""
        score: Literal["sigmoid", "softmax"] = "sigmoid"
        """Score function of the logits; softmax needs another rate, because its scores are smaller."""
        update: Literal["sign", "proportional"] = "sign"
        """Update of the bias: by the sign of mean load - load, or by that difference over the mean load."""
        rate: float = 0.001
        """Update rate u of the bias per step; 0 freezes it."""
        renormalise: bool = False
        """Divide the k weights by their sum."""
        scale: float = 1.0
        """Factor on all weights."""
        num_groups: int = 1
        """Groups of consecutive experts, for group-limited selection; 1: no groups."""
        kept_groups: int = 1
        """Groups that a token may use: those with the highest sum of their two best biased scores."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)
        self.register_buffer("bias_E", torch.zeros(context.num_experts))

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        why = "at 1 a renormalised weight is always 1; use renormalise=false"
        check_top_k(config.top_k, num_experts, smallest=2 if config.renormalise else 1, why=why)
        check_kept_groups(config.num_groups, config.kept_groups, config.top_k, num_experts)
        require(config.rate >= 0, "router.rate", config.rate, "at least 0")
        require(config.scale > 0, "router.scale", config.scale, "greater than 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        options = self.options
        logits_TE = self.gate(x_TD)
        rule = TopKRule(
            top_k=options.top_k,
            score=options.score,
            ranks_scores=True,
            weights="shares" if options.renormalise else "scores",
        )
        restrict = limit_to_groups(options.num_groups, options.kept_groups, best_of=2)
        bias_E = self.bias_E.float()  # for selection only
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule, bias_E=bias_E, restrict=restrict)
        return Routing.from_top_k(
            expert_TK,
            options.scale * weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        return {"sequence_balance": sequence_balance(recount_by_scores(record, self.options.top_k))}

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        mean = load_E.double().mean()
        deficit_E = (mean - load_E) / mean.clamp(min=1e-20)
        if self.options.update == "sign":
            deficit_E = deficit_E.sign()
        self.bias_E += self.options.rate * deficit_E.to(self.bias_E.dtype)


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x),  I = top-k(s + b) within the best groups,  w = 2.5 · s_I / Σ s_I,  b as loss_free",
        paper="arXiv:2412.19437, section 2.1.2",
        use="With hundreds of narrow experts in groups, balanced by a bias and a small loss within sequences.",
        beware="As loss_free. 8 experts per token and the factor 2.5 are meant for many experts; with few, set `top_k` "
        "and `scale`.",
        causality=Causality(causal=True, reason="as loss_free", batch_dependent=False),
        own_losses=("sequence_balance",),
    )
)
class DeepSeekV3(LossFree):
    """DeepSeek-V3's gate: loss-free balancing, normalised weights, and a small balance loss within sequences.

    The loss counts the k highest scores of each token (eq. 18), without bias and groups. The source has 256 routed
    experts in 8 groups, of which a token may use 4, and one shared expert: set `num_groups=8 kept_groups=4` and
    `layout.shared=1`. Its rate drops to 0 at the end of training.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LossFree.Config):
        """Options of loss_free with DeepSeek-V3's defaults."""

        name: str = "deepseek_v3"
        top_k: int = 8
        renormalise: bool = True
        scale: float = 2.5
        losses: dict[str, float] = field(default_factory=lambda: {"sequence_balance": 1e-4})
