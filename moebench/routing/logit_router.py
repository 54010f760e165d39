"""The contract of a router that assigns tokens by their logits alone, so that processes can gather logits."""

from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.router import ConfigT, Router
from moebench.routing.values import AnyRouting


class LogitRouter(Router[ConfigT]):
    """Computes logits of each token by itself (`score_tokens`), then an assignment of the whole batch (`assign`).

    For routers in which tokens of the whole batch compete: several processes gather E numbers of each token instead of
    its vector.
    """

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        return self.assign(self.score_tokens(x_TD, ctx), ctx)

    def score_tokens(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits_TE of each token, computed from this token alone."""
        raise NotImplementedError

    def assign(self, logits_TE: Tensor, ctx: RouteContext) -> AnyRouting:
        """Assign tokens to experts by their logits.

        Whether a token is valid is all that `ctx` knows of tokens. Weights and scores of a token may have gradients for
        its own logits alone.
        """
        raise NotImplementedError

    @property
    def needs_logits_only(self) -> bool:
        """Whether `forward` is `assign` of what `score_tokens` returns, and no subclass changes that."""
        return type(self).forward is LogitRouter.forward
