"""What a router may know besides the token vectors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.ranks import Ranks, Span


@dataclass(frozen=True, kw_only=True, eq=False)
class RouteContext:
    """All that a router may know besides the token vectors."""

    training: bool
    generator: torch.Generator
    """The only source of randomness: made anew for each step and layer from the seed, so nothing has to be saved."""
    sequence_length: int
    """Tokens of one sequence; T is a multiple of it."""
    token_id_T: Tensor | None = None
    """int64 token ids (language only)."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    present_T: Tensor | None = None
    """bool, False at padding alone, for routers that look at a token's neighbours; None: as `valid_T`. In a group of
    experts `valid_T` is False too for tokens that the router above sent elsewhere."""
    domain_T: Tensor | None = None
    """int64 domain of each token; in evaluation from `RouterBuildContext.num_domains` on for domains that are not trained on."""
    label_T: Tensor | None = None
    """int64: to which expert each token belongs, by number; of made data alone, for the router `oracle`."""
    embedding_TD: Tensor | None = None
    """What the network that all routers share says of each token; None: there is none."""
    step: int = 0
    span: Span | None = None
    """Which tokens of the batch these are; None: all of them."""
    previous_logits_TE: Tensor | None = None
    """fp32 router logits of the MoE layer in the blocks below, with its gradient; None: there is none, or it has none.
    Its experts may be more or fewer than this layer's."""
    advance: Callable[[int, Tensor], Tensor] | None = None
    """For routers over a chain of experts: (step, running_T bool) -> the fp32 state of all tokens, behind the expert
    of that step for those that run. None: no layer brings experts."""

    def uniform(self, num_tokens: int, *shape: int) -> Tensor:
        """Return uniform draws in [0, 1), [T, *shape]: token t of the batch draws the same in any process."""
        return self._draw(torch.rand, num_tokens, shape)

    def normal(self, num_tokens: int, *shape: int) -> Tensor:
        """Return standard normal draws, [T, *shape]: token t of the batch draws the same in any process."""
        return self._draw(torch.randn, num_tokens, shape)

    def uniform_for_all(self) -> Tensor:
        """Return one uniform draw in [0, 1) for the whole batch, a scalar: the same in any process."""
        return torch.rand((), generator=self.generator, device=self.generator.device)

    def position_T(self, num_tokens: int) -> Tensor:
        """Return each token's place in the whole batch (int64)."""
        start = self.span.start if self.span else 0
        return torch.arange(start, start + num_tokens, device=self.generator.device)

    def of_whole_batch(self, ranks: Ranks) -> "RouteContext":
        """Return the context of the tokens of all ranks together."""

        def whole(value_T: Tensor | None) -> Tensor | None:
            return None if value_T is None else ranks.gather(value_T)

        return replace(
            self,
            token_id_T=whole(self.token_id_T),
            valid_T=whole(self.valid_T),
            present_T=whole(self.present_T),
            domain_T=whole(self.domain_T),
            previous_logits_TE=whole(self.previous_logits_TE),
            label_T=whole(self.label_T),
            embedding_TD=whole(self.embedding_TD),
            span=None,
        )

    def batch_tokens(self, num_tokens: int) -> int:
        """Return T of the whole batch, of which `num_tokens` are here."""
        return self.span.total if self.span else num_tokens

    def _draw(self, draw: Callable[..., Tensor], num_tokens: int, shape: tuple[int, ...]) -> Tensor:
        start = self.span.start if self.span else 0
        total = self.batch_tokens(num_tokens)
        drawn = draw(total, *shape, generator=self.generator, device=self.generator.device)
        return drawn[start : start + num_tokens]
