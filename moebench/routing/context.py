"""What a router may read besides the token vectors: when it is built, and in each forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moebench.ranks import Ranks, Span
from moebench.routing.features.feature import Feature
from moebench.seeds import DeferredGenerator, as_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSummary:
    """Facts about a task's data before training; None where it does not apply."""

    vocab_size: int | None = None
    token_count_V: Tensor | None = None
    """int64: how often each token id occurs in the training split (language only)."""
    sequence_length: int | None = None
    """Tokens of one sequence, as the layers see it."""
    num_domains: int | None = None
    """Domains that the task trains on."""
    domains: tuple[str, ...] = ()
    """Names of all domains of the data, those that the task trains on first; empty: not known."""


NO_DATA = DataSummary()
"""The summary without any facts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RouteContext:
    """Everything that a router may read besides the token vectors."""

    training: bool
    generator: torch.Generator | DeferredGenerator
    """The only source of randomness: created for each step and layer from the seed, so checkpoints hold no state."""
    sequence_length: int
    """Tokens of one sequence; T is a multiple of it."""
    token_id_T: Tensor | None = None
    """int64 token ids (language only)."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    domain_T: Tensor | None = None
    """int64 domain of each token; in evaluation, domains that are not trained on begin at `DataSummary.num_domains`."""
    step: int = 0
    span: Span | None = None
    """Tokens of the batch that are on this process; None: all of them."""
    features: Mapping[type[Feature], Tensor] = field(default_factory=dict)
    """Values of the features that routers require, by token: the first dimension is T."""
    advance: Callable[[int, Tensor], Tensor] | None = None
    """For routers over a chain of experts: (step, running_T bool) -> the fp32 state of all tokens, after the expert of
    that step for those that run. None: there are no experts, the state stays as it is."""

    @property
    def random(self) -> torch.Generator:
        """The generator."""
        return as_generator(self.generator)

    def uniform(self, num_tokens: int, *shape: int) -> Tensor:
        """Return uniform draws in [0, 1), [T, *shape]: token t of the batch draws the same in any process."""
        return self._draw(torch.rand, num_tokens, shape)

    def normal(self, num_tokens: int, *shape: int) -> Tensor:
        """Return standard normal draws, [T, *shape]: token t of the batch draws the same in any process."""
        return self._draw(torch.randn, num_tokens, shape)

    def uniform_for_all(self) -> Tensor:
        """Return one uniform draw in [0, 1) for the whole batch, a scalar: the same in any process."""
        return torch.rand((), generator=self.random, device=self.generator.device)

    def position_T(self, num_tokens: int) -> Tensor:
        """Return the position of each token in the whole batch (int64)."""
        start = self.span.start if self.span else 0
        return torch.arange(start, start + num_tokens, device=self.generator.device)

    def of_whole_batch(self, ranks: Ranks) -> "RouteContext":
        """Return the context of the tokens of all ranks together."""
        lengths = self.span.lengths if self.span else ()

        def gather(value_T: Tensor | None) -> Tensor | None:
            return None if value_T is None else ranks.gather(value_T, lengths)

        return replace(
            self,
            token_id_T=gather(self.token_id_T),
            valid_T=gather(self.valid_T),
            domain_T=gather(self.domain_T),
            features={feature: ranks.gather(value_T, lengths) for feature, value_T in self.features.items()},
            span=None,
        )

    def of_scored_batch(self, ranks: Ranks) -> "RouteContext":
        """Return the context of the tokens of all ranks together, with nothing of a token but whether it is valid."""
        return replace(self, token_id_T=None, domain_T=None, features={}).of_whole_batch(ranks)

    def batch_tokens(self, num_tokens: int) -> int:
        """Return T of the whole batch; `num_tokens` of them are on this process."""
        return self.span.total if self.span else num_tokens

    def _draw(self, draw: Callable[..., Tensor], num_tokens: int, shape: tuple[int, ...]) -> Tensor:
        start = self.span.start if self.span else 0
        total = self.batch_tokens(num_tokens)
        value_T = draw(total, *shape, generator=self.random, device=self.generator.device)
        return value_T[start : start + num_tokens]
