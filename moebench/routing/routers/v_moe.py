"""V-MoE: top-k of a softmax with a little noise, and the surest tokens first when experts are full."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.losses import squared_variation
from moebench.routing.ranking import log_scores, rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.routers.noisy_top_k import smooth_load
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x + N(0, (σ/E)²)),  w = p_top-k;  slots go to first choices by descending max_e p",
        paper="arXiv:2106.05974, section 2 and appendix C (batch prioritized routing)",
        use="Vision at small capacity: what is dropped are the patches that matter least.",
        beware="With a capacity, later tokens displace earlier ones: not for models that generate. Its gain is "
        "small when nothing is dropped.",
        causality=Causality(
            causal=True,
            reason="dropless, each token is routed by its own vector and its own noise",
            batch_dependent=False,
            with_capacity=False,  # a later token that is surer takes the slot of an earlier one
        ),
        own_losses=("score_importance", "load"),
    )
)
class VMoE(Router["VMoE.Config"]):
    """Vision MoE (Riquelme et al. 2021): softmax before top-k, weights as they are, batch prioritized routing.

    Priority is what makes small capacities work: what is dropped are the tokens that the router cares least about.
    It chooses within the whole batch, where the paper's groups are devices. By default it is for evaluation alone, as
    in the configurations of the paper's code, whose coefficients the losses have too. The importance loss is taken over
    the probabilities without noise; the load loss uses the exact chance to be chosen (see `noisy_top_k`), where the
    paper's code takes one threshold for all experts, so that its loads do not sum to k.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of V-MoE."""

        name: str = "v_moe"
        top_k: int = 2
        """Experts per token."""
        noise: float = 1.0
        """Standard deviation of the noise on the logits in training, times E (σ)."""
        priority: Literal["best", "sum", "position"] = "best"
        """Who keeps a slot in evaluation: the token with the highest probability, with the highest sum over its k
        experts, or the earlier one; always first choices before second ones."""
        priority_train: Literal["best", "sum", "position"] = "position"
        """The same in training."""
        losses: dict[str, float] = field(default_factory=lambda: {"score_importance": 0.005, "load": 0.005})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and a noise below 0."""
        check_top_k(config.top_k, num_experts)
        require(config.noise >= 0, "router.noise", config.noise, "at least 0")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its k most probable experts under the noise."""
        top_k, std = self.options.top_k, self.options.noise / self.num_experts
        clean_TE = self.gate(x_TD)
        noisy_TE, extras = clean_TE, {}
        if ctx.training and std > 0:
            noisy_TE = clean_TE + std * ctx.normal(*clean_TE.shape)
            std_TE = torch.full_like(clean_TE, std)
            extras = {"load_E": smooth_load(clean_TE, noisy_TE, std_TE, top_k, ctx.valid_T)}
        scores_TE = noisy_TE.softmax(-1)
        expert_TK = rank_top_k(noisy_TE, top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        routing = Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=clean_TE, scores_TE=scores_TE
        )
        priority_TK = self._priority(weight_TK.detach(), ctx)
        return replace(routing, priority_N=priority_TK.reshape(-1), extras=extras)

    def _priority(self, weight_TK: Tensor, ctx: RouteContext) -> Tensor:
        """Return a priority that falls from choice to choice by more than tokens differ; within one, by the token."""
        num_tokens, top_k = weight_TK.shape
        priority = self.options.priority_train if ctx.training else self.options.priority
        if priority == "position":
            rank_T, step = -ctx.position_T(num_tokens), ctx.batch_tokens(num_tokens)
        else:
            best_T = weight_TK[:, 0] if priority == "best" else weight_TK.sum(-1)
            rank_T, step = log_scores(best_T).clamp(max=0).double(), 128  # a sum of all may round to more than 1
        return rank_T.unsqueeze(-1) - step * torch.arange(top_k, device=weight_TK.device)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the squared variations of the mean probabilities and of the expected loads."""
        logits_TE = record.routing.logits_TE
        assert logits_TE is not None
        smooth_E = record.routing.extras.get("load_E")
        return {
            "score_importance": squared_variation(record.mean(logits_TE.softmax(-1))),
            "load": squared_variation(record.load_E.float() if smooth_E is None else record.total(smooth_E)),
        }
