"""The values that travel between a router, the MoE layer, the losses and the metrics.

Shape letters: B batch, L length, T tokens (B·L), D model width, F expert hidden width, E experts, K experts per
token, C capacity, N assignments, R received rows. Tensors carry them as a suffix; scalars carry none.
All values are frozen: a change is a new value, and nothing is stored on a module during forward, where the
recomputation of activation checkpointing would count it twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Which token goes to which expert with which weight: a list of N assignments.

    A list of pairs says token choice, expert choice, top-p, ReLU routing, hashing and dropping alike.
    """

    token_N: Tensor
    """int64, 0 ... T-1."""
    expert_N: Tensor
    """int64, 0 ... E-1. No pair (token, expert) occurs twice."""
    weight_N: Tensor
    """fp32: the factor on the expert's output in the sum over a token's experts."""
    num_tokens: int
    num_experts: int
    logits_TE: Tensor | None = None
    """fp32 router logits, None where the router has no gate."""
    scores_TE: Tensor | None = None
    """fp32 scores (softmax, sigmoid ...) that the balance losses average, None where there are none."""
    priority_N: Tensor | None = None
    """Who keeps a slot when an expert is over capacity: the highest stays. None: the earlier token stays."""
    top_k: int | None = None
    """K when the list is a token-major T×K rectangle, so that the combine can gather instead of scatter."""
    kept_N: Tensor | None = None
    """bool: which assignments count; None: all. The others have weight 0 and are computed by nobody."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the router's own losses need and nothing else carries, by name."""

    @classmethod
    def from_top_k(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        *,
        num_experts: int,
        logits_TE: Tensor | None = None,
        scores_TE: Tensor | None = None,
        priority_TK: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> "Routing":
        """Build the list from the rectangle that token choice makes: K experts for each of T tokens."""
        num_tokens, top_k = expert_TK.shape
        token_T = torch.arange(num_tokens, device=expert_TK.device)
        return cls(
            token_N=token_T.repeat_interleave(top_k),
            expert_N=expert_TK.reshape(-1),
            weight_N=weight_TK.reshape(-1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            priority_N=None if priority_TK is None else priority_TK.reshape(-1),
            top_k=top_k,
            extras=extras or {},
        )

    def keep(self, kept_N: Tensor) -> "Routing":
        """Return the routing in which only the assignments where `kept_N` (bool) is true still count.

        The list keeps its length: its shape never depends on data, so a GPU is not waited for, and a rectangle
        stays one.
        """
        kept_N = kept_N if self.kept_N is None else kept_N & self.kept_N
        return replace(self, weight_N=self.weight_N.where(kept_N, 0.0), kept_N=kept_N)

    def compact(self) -> "Routing":
        """Return the routing with the assignments that count and no others; waits for the device."""
        if self.kept_N is None:
            return self
        return replace(
            self,
            token_N=self.token_N[self.kept_N],
            expert_N=self.expert_N[self.kept_N],
            weight_N=self.weight_N[self.kept_N],
            priority_N=None if self.priority_N is None else self.priority_N[self.kept_N],
            top_k=None,
            kept_N=None,
        )

    @property
    def load_E(self) -> Tensor:
        """Assignments per expert, int64."""
        return self._count(self.expert_N, self.num_experts)

    @property
    def experts_per_token_T(self) -> Tensor:
        """Assignments per token, int64; 0 marks an unserved token."""
        return self._count(self.token_N, self.num_tokens)

    def _count(self, index_N: Tensor, size: int) -> Tensor:
        # A scatter with a fixed output size: bincount would wait for the device to say how long its result is.
        zeros = torch.zeros(size, dtype=torch.int64, device=index_N.device)
        return zeros.scatter_add(0, index_N, torch.ones_like(index_N) if self.kept_N is None else self.kept_N.long())


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
    domain_T: Tensor | None = None
    """int64 domain of each token."""
    step: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecord:
    """What happened in one MoE layer: losses and metrics are pure functions of it."""

    layer: int | str
    """Index of the block, from 0; of experts in its attention, "3.attention"."""
    routing: Routing
    """Before capacity."""
    kept: Routing
    """After capacity: what the experts computed."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""

    @property
    def num_dropped(self) -> int:
        """Assignments lost to capacity."""
        return int(self.routing.load_E.sum() - self.kept.load_E.sum())
