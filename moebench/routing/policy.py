"""Policy gradients for routers: sampled actions, per-token rewards, baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, uniform_to_gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import Router, RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(RouterConfig):
    """Options of routers that learn by policy gradients."""

    policy: float = 1.0
    """Coefficient of the policy gradient; at 1 it is the gradient of the expected task loss."""
    entropy: float = 0.01
    """Coefficient of the policy's entropy (nats), which is maximised to keep the policy exploring."""
    baseline: Literal["mean", "learned", "none"] = "mean"
    """Value subtracted from the reward: its running mean, the mean plus a learned linear function of the token, or
    nothing."""
    decay: float = 0.99
    """Decay of the running mean per step; the first steps are averaged evenly."""
    value: float = 0.01
    """Coefficient of the Huber loss that trains the learned baseline (baseline=learned)."""


class PolicyRouter(Router):
    """Router that samples its choice and learns by REINFORCE from the reward of each token.

    L_t = -policy · (R_t - b_t) log π(a_t) - entropy · H(π_t) + value · Huber(v_t, R_t - mean),  R_t = -task loss of t.

    The reward is the log-likelihood of the token's own prediction; what a choice does for later tokens through
    attention is not credited. The baseline is fixed before the step, so it changes the variance of the gradient and not
    its mean. In the first step, before any reward is known, the mean is taken to be the reward itself.
    """

    mean: Tensor
    num_steps: Tensor

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.value = Gate(context.d_model, 1) if config.baseline == "learned" else None
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        for key in ("policy", "entropy", "value"):
            require(getattr(config, key) >= 0, f"router.{key}", getattr(config, key), "at least 0")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    def build_extras(self, x_TD: Tensor, log_policy_T: Tensor, entropy_T: Tensor) -> dict[str, Tensor]:
        """Return the extras of the routing for `objective`: log π of the action and the entropy of π, in nats."""
        extras = {"log_policy_T": log_policy_T, "entropy_T": entropy_T}
        if self.value is not None:  # the baseline's gradient must not reach the tokens
            extras["value_T"] = self.value(x_TD.detach()).squeeze(-1)
        return extras

    def reward(self, record: LayerRecord) -> Tensor:
        """Return the reward of each token: the log-likelihood of its prediction, in nats."""
        assert record.token_loss_T is not None, "the record has no task loss yet"
        return -record.token_loss_T.float()

    @override
    def objective(self, record: LayerRecord) -> Tensor:
        options, extras = self.options, record.routing.token_extras
        centered_T = self._subtract_mean(self.reward(record))
        advantage_T = (centered_T - extras["value_T"] if "value_T" in extras else centered_T).detach()
        loss_T: Tensor = -options.policy * advantage_T * extras["log_policy_T"] - options.entropy * extras["entropy_T"]
        if "value_T" in extras:
            loss_T = loss_T + options.value * functional.huber_loss(extras["value_T"], centered_T, reduction="none")
        return loss_T

    def _subtract_mean(self, reward_T: Tensor) -> Tensor:
        if self.options.baseline == "none":
            return reward_T
        mean_T: Tensor = torch.where(self.num_steps > 0, self.mean, reward_T)
        return reward_T - mean_T

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        reward_T = self.reward(record).double()
        valid_T = torch.ones_like(reward_T) if record.valid_T is None else record.valid_T.double()
        return {"reward": (reward_T * valid_T).sum(), "tokens": valid_T.sum()}

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        update_running_mean_(self.mean, statistics["reward"], statistics["tokens"], self.num_steps, self.options.decay)


def update_running_mean_(mean: Tensor, total: Tensor, count: Tensor, num_steps: Tensor, decay: float) -> None:
    """Update a running mean and its number of steps in place, elementwise, where `count` is not 0.

    `total` is the sum of `count` values. Step n moves the mean by 1 / (n + 1), at least 1 - decay, of the difference.
    """
    rate = (1.0 / (num_steps + 1)).clamp(min=1 - decay)
    updated = mean + rate * (total / count.clamp(min=1) - mean)
    mean.copy_(torch.where(count > 0, updated, mean))
    num_steps.add_(count > 0)


def sample_actions(logits_TA: Tensor, ctx: RouteContext) -> Tensor:
    """Sample an action per token from the softmax of its logits (Gumbel-max); in evaluation take the most likely."""
    ranked_TA = logits_TA.detach()
    if ctx.training:
        ranked_TA = ranked_TA + uniform_to_gumbel(ctx.uniform(*logits_TA.shape))
    return rank_top_k(ranked_TA, 1).squeeze(-1)


def log_prob_and_entropy(logits_TA: Tensor, action_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return log π of the actions, [T], and the entropy of π, [T], in nats."""
    log_TA = logits_TA.log_softmax(-1)
    action_log_T = log_TA.gather(-1, action_T.unsqueeze(-1)).squeeze(-1)
    return action_log_T, -(log_TA.exp() * log_TA).sum(-1)
