"""Mixture of depths: only a share of each sequence's tokens is processed; the others skip the layer (arXiv:2404.02258).

A linear score ranks the tokens of a sequence, and the top share is routed to experts as in Switch. Because ranking
needs the whole sequence, evaluation uses a predictor that is trained to reproduce the selection from the token alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_all, rank_top_k, round_to_quantum
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.selection import select
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="r = w·x;  training: the C = share·L tokens of a sequence with the highest r, evaluation: those whose "
        "predictor sigmoid(MLP(sg(x))) > 1/2;  p = softmax(W x), i = argmax p, y = sigmoid(r) p_i E_i(x), "
        "others y = 0",
        paper="arXiv:2404.02258, section 3",
        use="When compute should be spent on the tokens that need it: the others skip the layer.",
        beware="Training selects within a whole sequence, which is not causal; evaluation uses a predictor, and "
        "routes differently where the predictor errs.",
        causality=Causality(
            causal=False,
            reason="in training, whether a token is selected depends on later tokens of its sequence",
            batch_dependent=False,
            in_evaluation=True,
        ),
        variable_k=True,
        budget=Knob(attribute="predictor_shift", low=-50.0, high=50.0, unit=1.0, in_training=False),
        trained_by_own_loss=("predictor_in", "predictor_out"),
        own_losses=("membership",),
    )
)
class MixtureOfDepths(Router["MixtureOfDepths.Config"]):
    """Mixture of depths and experts, staged (Raposo et al. 2024): select tokens, then route them by Switch's top-1.

    With one expert it is mixture of depths over a feed-forward network; attention is not skipped, as it is in the
    paper. The weight is sigmoid(r), because weights are not negative here; the paper uses r. The predictor is trained
    by `membership`, the cross-entropy (nats) with the selection, on detached inputs, so it does not affect the model:
    ln 2 without information, 0 at best. Capacity factors count all tokens, not only the selected ones.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of mixture of depths."""

        name: str = "mixture_of_depths"
        share: float = 0.5
        """Share of the tokens of a sequence that is processed (at least one); the paper's 0.125 is for large models."""
        predictor_width: int = 16
        """Hidden width of the predictor that selects in evaluation."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "membership": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.share = config.share
        self.predictor_shift = 0.0
        """Added to the predictor's logits in evaluation."""
        self.depth = Gate(context.d_model, 1)
        self.gate = Gate(context.d_model, context.num_experts)
        self.predictor_in = Gate(context.d_model, config.predictor_width, init_scale=1.0)
        self.predictor_out = Gate(config.predictor_width, 1)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(0 < config.share <= 1, "router.share", config.share, "greater than 0 and at most 1")
        require(config.predictor_width >= 1, "router.predictor_width", config.predictor_width, "at least 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        depth_T = self.depth(x_TD).squeeze(-1)
        predicted_T = self.predictor_out(self.predictor_in(x_TD.detach()).relu()).squeeze(-1)
        selected_T = self._select_top(depth_T.detach(), ctx)
        logits_TE = self.gate(x_TD)
        scores_TE = depth_T.sigmoid().unsqueeze(-1) * logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, 1)
        routing = Routing.from_top_k(
            expert_TK,
            scores_TE.gather(-1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            token_extras={"predicted_T": predicted_T, "first_T": selected_T},
        )
        chosen_T = selected_T if ctx.training else round_to_quantum(predicted_T + self.predictor_shift) > 0
        return select(routing, chosen_T)

    def _select_top(self, depth_T: Tensor, ctx: RouteContext) -> Tensor:
        """Return which tokens are among the top C of their sequence, bool; C is its share of the valid tokens."""
        depth_BL = depth_T.view(-1, ctx.sequence_length)
        valid_BL = torch.ones_like(depth_BL, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T.view_as(depth_BL)
        ranked_BL = depth_BL.masked_fill(~valid_BL, -torch.inf)
        position_BL = rank_all(ranked_BL).argsort(dim=-1)
        capacity_B1 = (valid_BL.sum(-1, keepdim=True) * self.share + 1e-6).long().clamp(min=1)
        selected_BL: Tensor = valid_BL & (position_BL < capacity_B1)
        return selected_BL.reshape(-1)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        extras = record.routing.token_extras
        loss_T = functional.binary_cross_entropy_with_logits(
            extras["predicted_T"], extras["first_T"].float(), reduction="none"
        )
        return {"membership": reduce_record(record, lambda mean: mean, means=[loss_T])}

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        return self.share
