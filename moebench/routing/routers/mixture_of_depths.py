"""Mixture of depths: some tokens of each sequence go to an expert, the others go round the layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_all, rank_top_k, rounded
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="r = w·x;  training: the C = share·L tokens of a sequence with the highest r, evaluation: those whose "
        "predictor sigmoid(MLP(sg(x))) > 1/2;  p = softmax(W x), i = argmax p, y = sigmoid(r) p_i E_i(x), others y = 0",
        paper="arXiv:2404.02258, section 3",
        use="Spending compute on the tokens that need it: the others pass the layer by.",
        beware="Training chooses among a whole sequence, which leaks; evaluation uses a predictor, so the two "
        "differ as far as it errs.",
        causality=Causality(
            causal=False,
            reason="in training, whether a token is among the first C depends on later tokens of its sequence",
            batch_dependent=False,
            in_evaluation=True,
        ),
        variable_k=True,
        trained_by_own_loss=("predictor_in", "predictor_out"),
        own_losses=("membership",),
    )
)
class MixtureOfDepths(Router["MixtureOfDepths.Config"]):
    """Mixture of depths and experts, staged (Raposo et al. 2024): who goes on, then Switch's top-1 over the experts.

    With one expert it is mixture of depths over a feed-forward network; attention is not skipped, as it is in the
    paper. r weighs by its sigmoid, since weights are not negative here; the paper uses r itself. The predictor learns
    from `membership`, the cross-entropy with who was among the first C, on inputs without gradient: it takes nothing
    from the model. At ln 2 it knows nothing, at 0 everything. A capacity factor counts all tokens, not those that go
    on.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of mixture of depths."""

        name: str = "mixture_of_depths"
        share: float = 0.5
        """Share of the tokens of a sequence that go on (at least one does); the paper's 0.125 is for large models."""
        predictor_width: int = 16
        """Hidden width of the predictor that decides in evaluation."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "membership": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.share = config.share
        self.depth = Gate(context.d_model, 1)
        self.gate = Gate(context.d_model, context.num_experts)
        self.predictor_in = Gate(context.d_model, config.predictor_width, init_scale=1.0)
        self.predictor_out = Gate(config.predictor_width, 1)

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a share outside 0 ... 1 and a predictor without units."""
        require(0 < config.share <= 1, "router.share", config.share, "greater than 0 and at most 1")
        require(config.predictor_width >= 1, "router.predictor_width", config.predictor_width, "at least 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Let the first C of each sequence go on, in evaluation those that the predictor takes for them."""
        depth_T = self.depth(x_TD).squeeze(-1)
        predicted_T = self.predictor_out(self.predictor_in(x_TD.detach()).relu()).squeeze(-1)
        first_T = self._first(depth_T.detach(), ctx)
        logits_TE = self.gate(x_TD)
        scores_TE = depth_T.sigmoid().unsqueeze(-1) * logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, 1)
        routing = Routing.from_top_k(
            expert_TK,
            scores_TE.gather(-1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            token_extras={"predicted_T": predicted_T, "first_T": first_T},
        )
        return routing.keep(first_T if ctx.training else rounded(predicted_T) > 0).compact()

    def _first(self, depth_T: Tensor, ctx: RouteContext) -> Tensor:
        """Return who is among the C first of the sequence, bool; C is the share of its tokens that are no padding."""
        depth_BL = depth_T.view(-1, ctx.sequence_length)
        valid_BL = torch.ones_like(depth_BL, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T.view_as(depth_BL)
        ranked_BL = depth_BL.masked_fill(~valid_BL, -torch.inf)
        place_BL = rank_all(ranked_BL).argsort(dim=-1)
        seats_B1 = (valid_BL.sum(-1, keepdim=True) * self.share + 1e-6).long().clamp(min=1)
        first_BL: Tensor = valid_BL & (place_BL < seats_B1)
        return first_BL.reshape(-1)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the predictor's cross-entropy, in nats."""
        extras = record.routing.token_extras
        loss_T = functional.binary_cross_entropy_with_logits(
            extras["predicted_T"], extras["first_T"].float(), reduction="none"
        )
        return {"membership": record.mean(loss_T)}

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return the share: what a token costs on average."""
        return self.share
