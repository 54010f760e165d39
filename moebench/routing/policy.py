"""What routers that learn by reinforcement share: draws, rewards, baselines, the policy gradient of a token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate, gumbel
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import Router, RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(RouterConfig):
    """Options of every router that learns by policy gradients."""

    policy: float = 1.0
    """Coefficient of the policy gradient; at 1 it is the gradient of the expected task loss."""
    entropy: float = 0.01
    """Coefficient of the policy's entropy in nats, which is rewarded: it keeps the policy exploring."""
    baseline: Literal["mean", "learned", "none"] = "mean"
    """What a reward is compared with: its running mean, that plus a linear function of the token, or 0."""
    decay: float = 0.99
    """How much of the running mean a step keeps; the first steps are averaged evenly."""
    value: float = 0.01
    """Coefficient of the Huber loss by which the linear function learns (baseline=learned)."""


class PolicyRouter(Router):
    """A router whose choice is a draw, and which learns from the reward that each token gets for it.

    L_t = -policy · (R_t - b_t) log π(a_t) - entropy · H(π_t) + value · Huber(v_t, R_t - mean),  R_t = -task loss of t.
    The reward is the loss of the token's own prediction: what a choice does for later tokens is not counted.
    The baseline is set before the step, so it changes the variance of the gradient and not its mean. In the first step
    nothing is known yet and the mean is taken to be the reward itself.
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
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse negative coefficients and a decay that is none."""
        for key in ("policy", "entropy", "value"):
            require(getattr(config, key) >= 0, f"router.{key}", getattr(config, key), "at least 0")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    def decided(self, x_TD: Tensor, log_policy_T: Tensor, entropy_T: Tensor) -> dict[str, Tensor]:
        """Return what a routing must carry for `objective`: log π of what was drawn, and the entropy of π, in nats."""
        extras = {"log_policy_T": log_policy_T, "entropy_T": entropy_T}
        if self.value is not None:  # it learns from the tokens and does not shape them
            extras["value_T"] = self.value(x_TD.detach()).squeeze(-1)
        return extras

    def reward(self, record: LayerRecord) -> Tensor:
        """Return the reward of each token: the log-likelihood that the task gives it."""
        assert record.token_loss_T is not None, "the record has not been judged"
        return -record.token_loss_T.float()

    def objective(self, record: LayerRecord) -> Tensor:
        """Return the policy gradient, the entropy and the error of the baseline of each token as one loss."""
        options, extras = self.options, record.routing.token_extras
        better_T = self._over_mean(self.reward(record))
        advantage_T = (better_T - extras["value_T"] if "value_T" in extras else better_T).detach()
        loss_T: Tensor = -options.policy * advantage_T * extras["log_policy_T"] - options.entropy * extras["entropy_T"]
        if "value_T" in extras:
            loss_T = loss_T + options.value * functional.huber_loss(extras["value_T"], better_T, reduction="none")
        return loss_T

    def _over_mean(self, reward_T: Tensor) -> Tensor:
        if self.options.baseline == "none":
            return reward_T
        mean_T: Tensor = torch.where(self.num_steps > 0, self.mean, reward_T)
        return reward_T - mean_T

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the sum of rewards, and of how many tokens."""
        reward_T = self.reward(record).double()
        valid_T = torch.ones_like(reward_T) if record.valid_T is None else record.valid_T.double()
        return {"reward": (reward_T * valid_T).sum(), "tokens": valid_T.sum()}

    @torch.no_grad()
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Move the running mean; a step without tokens changes nothing."""
        follow(self.mean, statistics["reward"], statistics["tokens"], self.num_steps, self.options.decay)


def follow(mean: Tensor, summed: Tensor, count: Tensor, num_steps: Tensor, decay: float) -> None:
    """Move a running mean and its number of steps in place, element by element, where `count` is not 0."""
    rate = (1.0 / (num_steps + 1)).clamp(min=1 - decay)
    moved = mean + rate * (summed / count.clamp(min=1) - mean)
    mean.copy_(torch.where(count > 0, moved, mean))
    num_steps.add_(count > 0)


def drawn(logits_TA: Tensor, ctx: RouteContext) -> Tensor:
    """Return an action of each token from the softmax of its logits; in evaluation the most likely one."""
    ranked_TA = logits_TA.detach()
    if ctx.training:
        ranked_TA = ranked_TA + gumbel(ctx.uniform(*logits_TA.shape))
    return rank_top_k(ranked_TA, 1).squeeze(-1)


def certainty(logits_TA: Tensor, action_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return log π of the actions and the entropy of π, in nats."""
    log_TA = logits_TA.log_softmax(-1)
    chosen_T = log_TA.gather(-1, action_T.unsqueeze(-1)).squeeze(-1)
    return chosen_T, -(log_TA.exp() * log_TA).sum(-1)
