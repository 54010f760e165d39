"""V-MoE: top-k with Gaussian noise and batch prioritized routing (arXiv:2106.05974).

Noise of fixed scale is added to the logits in training; the k most probable experts under the noise are selected,
weighted by their probabilities. If a capacity is exceeded, tokens with the highest probability keep their slots.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.losses import compute_squared_variation
from moebench.routing.ranking import log_scores
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.routers.noisy_top_k import estimate_smooth_load
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x + N(0, (σ/E)²)),  w = p_top-k;  slots go to first choices by descending max_e p",
        paper="arXiv:2106.05974, section 2 and appendix C (batch prioritized routing)",
        use="In vision at a small capacity: the patches that are dropped matter least.",
        beware="With a capacity, later tokens displace earlier ones, so it does not suit autoregressive models. There "
        "is little gain when nothing is dropped.",
        causality=Causality(
            causal=True,
            reason="dropless, each token is routed by its own vector and its own noise",
            batch_dependent=False,
            with_capacity=False,  # a later token with a higher probability takes the slot of an earlier one
        ),
        own_losses=("score_importance", "load"),
    )
)
class VMoE(Router["VMoE.Config"]):
    """Vision MoE (Riquelme et al. 2021): softmax before top-k, raw weights, batch prioritized routing.

    Prioritized routing makes small capacities work: the tokens with the lowest router probabilities are dropped. Here
    it ranks the whole batch; in the paper, the tokens of a device. As in the configurations of the paper's code it is
    used in evaluation only by default; the loss coefficients are those of the code too. The importance loss is computed
    from the probabilities without noise. The load loss uses the exact selection probability (see `noisy_top_k`), where
    the paper's code uses one threshold for all experts, so that its loads do not sum to k.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of V-MoE."""

        name: str = "v_moe"
        top_k: int = 2
        """Experts per token."""
        noise: float = 1.0
        """Standard deviation σ of the noise on the logits in training, times E."""
        priority: Literal["best", "sum", "position"] = "best"
        """Which token keeps a slot in evaluation: the one with the highest probability (best), with the highest sum
        over its k experts (sum), or the earlier one (position). First choices always precede second ones."""
        priority_train: Literal["best", "sum", "position"] = "position"
        """The order in training."""
        losses: dict[str, float] = field(default_factory=lambda: {"score_importance": 0.005, "load": 0.005})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.noise >= 0, "router.noise", config.noise, "at least 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        top_k, std = self.options.top_k, self.options.noise / self.num_experts
        clean_TE = self.gate(x_TD)
        noisy_TE, extras = clean_TE, {}
        if ctx.training and std > 0:
            noisy_TE = clean_TE + std * ctx.normal(*clean_TE.shape)
            std_TE = torch.full_like(clean_TE, std)
            extras = {"load_E": estimate_smooth_load(clean_TE, noisy_TE, std_TE, top_k, ctx.valid_T)}
        expert_TK, weight_TK, scores_TE = choose_top_k(noisy_TE, TopKRule(top_k=top_k))
        routing = Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=clean_TE, scores_TE=scores_TE
        )
        priority_TK = self._priority(weight_TK.detach(), ctx)
        return replace(routing, priority_N=priority_TK.reshape(-1), extras=extras)

    def _priority(self, weight_TK: Tensor, ctx: RouteContext) -> Tensor:
        """Return a priority for capacity: all first choices before all second ones; within each, by token."""
        num_tokens, top_k = weight_TK.shape
        mode = self.options.priority_train if ctx.training else self.options.priority
        if mode == "position":
            priority_T, step = -ctx.position_T(num_tokens), ctx.batch_tokens(num_tokens)
        else:
            best_T = weight_TK[:, 0] if mode == "best" else weight_TK.sum(-1)
            priority_T, step = log_scores(best_T).clamp(max=0).double(), 128  # a sum over all experts may round above 1
        return priority_T.unsqueeze(-1) - step * torch.arange(top_k, device=weight_TK.device)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        smooth_E = record.routing.extras.get("load_E")
        load_E = record.routing.load_E.float() if smooth_E is None else smooth_E
        return {
            "score_importance": reduce_record(record, compute_squared_variation, means=[logits_TE.softmax(-1)]),
            "load": reduce_record(record, compute_squared_variation, totals=[load_E]),
        }
