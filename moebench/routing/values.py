"""The values that travel between a router, the MoE layer, the losses and the metrics.

Shape letters: B batch, L length, T tokens (B·L), D model width, F expert hidden width, E experts, K experts per
token, C capacity, S slots, N assignments, R received rows. Tensors carry them as a suffix; scalars carry none.
All values are frozen: a change is a new value, and nothing is stored on a module during forward, where the
recomputation of activation checkpointing would count it twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from moebench.ranks import SINGLE_RANK, Ranks
from moebench.routing.mixing import MergeRouting, SoftRouting


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
    """Who keeps a slot when an expert is over capacity: the highest stays; neighbours up to 8e-6 apart count as equal
    (`ranking.TOLERANCE`). None: the earlier token stays."""
    top_k: int | None = None
    """K when the list is a token-major T×K rectangle, so that the combine can gather instead of scatter."""
    kept_N: Tensor | None = None
    """bool: which assignments count; None: all. The others have weight 0 and are computed by nobody."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the router's own losses need and nothing else carries, by name."""
    computes_padding: ClassVar[bool] = False
    """Padding is not in the list, so no expert computes it."""

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

    @classmethod
    def from_table(
        cls,
        weight_TE: Tensor,
        chosen_TE: Tensor,
        *,
        logits_TE: Tensor | None = None,
        scores_TE: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> "Routing":
        """Build the list from a table: each token goes where `chosen_TE` (bool) says, to any number of experts.

        All T·E pairs are listed, so that the length does not depend on data (see `keep`).
        """
        num_tokens, num_experts = weight_TE.shape
        index_TE = torch.arange(num_tokens * num_experts, device=weight_TE.device)
        listed = cls(
            token_N=index_TE // num_experts,
            expert_N=index_TE % num_experts,
            weight_N=weight_TE.reshape(-1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            extras=extras or {},
        )
        return listed.keep(chosen_TE.reshape(-1))

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

    def slice_tokens(self, start: int, num_tokens: int) -> "Routing":
        """Return the part of a whole batch's routing that concerns tokens start ... start + num_tokens - 1.

        Extras that have a number per token (names that end in _T) are cut; the others stay those of the batch.
        """
        end = start + num_tokens
        own_N = (self.token_N >= start) & (self.token_N < end)
        return replace(
            self,
            token_N=self.token_N[own_N] - start,
            expert_N=self.expert_N[own_N],
            weight_N=self.weight_N[own_N],
            num_tokens=num_tokens,
            logits_TE=None if self.logits_TE is None else self.logits_TE[start:end],
            scores_TE=None if self.scores_TE is None else self.scores_TE[start:end],
            priority_N=None if self.priority_N is None else self.priority_N[own_N],
            kept_N=None if self.kept_N is None else self.kept_N[own_N],
            extras={name: x[start:end] if name.endswith("_T") else x for name, x in self.extras.items()},
        )

    @property
    def counted_N(self) -> Tensor:
        """bool: which assignments count."""
        return torch.ones_like(self.expert_N, dtype=torch.bool) if self.kept_N is None else self.kept_N

    @property
    def load_E(self) -> Tensor:
        """Assignments per expert, int64."""
        return self._count(self.expert_N, self.num_experts)

    @property
    def rows_E(self) -> Tensor:
        """Rows that each expert computes: its assignments."""
        return self.load_E

    @property
    def importance_E(self) -> Tensor:
        """Summed weights per expert."""
        zeros_E = torch.zeros(self.num_experts, dtype=self.weight_N.dtype, device=self.weight_N.device)
        return zeros_E.index_add(0, self.expert_N, self.weight_N)

    @property
    def experts_per_token_T(self) -> Tensor:
        """Assignments per token, int64; 0 marks an unserved token."""
        return self._count(self.token_N, self.num_tokens)

    def _count(self, index_N: Tensor, size: int) -> Tensor:
        # A scatter with a fixed output size: bincount would wait for the device to say how long its result is.
        zeros = torch.zeros(size, dtype=torch.int64, device=index_N.device)
        return zeros.scatter_add(0, index_N, torch.ones_like(index_N) if self.kept_N is None else self.kept_N.long())


class ChainRouting(Routing):
    """All pairs (see `from_table`) of experts one behind another: kept are a token's steps, weighed as its states."""


AnyRouting = Routing | SoftRouting | MergeRouting
"""What a router may return."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecord:
    """What happened in one MoE layer: losses and metrics are pure functions of it."""

    layer: int | str
    """Index of the block, from 0; of experts in its attention, "3.attention"."""
    routing: AnyRouting
    """Before capacity."""
    kept: AnyRouting
    """After capacity: what the experts computed; the same assignments in the same order, some of them rerouted."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    sequence_length: int | None = None
    """Tokens of one sequence; T is a multiple of it. None: not known."""
    flops_E: tuple[int, ...] = ()
    """Forward FLOPs of one row through each expert of the layer; empty: not known, taken to be equal."""
    ranks: Ranks = SINGLE_RANK
    """Over whose tokens losses take their sums and means: those of all processes, or SINGLE_RANK."""
    token_loss_T: Tensor | None = None
    """Task loss of each token in nats, without gradient; None until the task has judged the model's output."""

    def total(self, value: Tensor) -> Tensor:
        """Return a sum over this process's tokens as one over the tokens of all `ranks`."""
        return self.ranks.sum(value)

    def mean(self, value_T: Tensor) -> Tensor:
        """Return the mean over tokens (the first dimension), without padding; 0 for no tokens at all."""
        if self.valid_T is None:
            num_tokens = torch.full((1,), value_T.shape[0], dtype=value_T.dtype, device=value_T.device)
        else:
            mask_T = self.valid_T.to(value_T.dtype).view(-1, *[1] * (value_T.dim() - 1))
            value_T, num_tokens = value_T * mask_T, mask_T.sum().view(1)
        summed = torch.cat([value_T.sum(0).reshape(-1), num_tokens])  # one exchange for both
        summed = self.total(summed)
        return (summed[:-1] / summed[-1].clamp(min=1)).view(value_T.shape[1:])

    @property
    def num_positions(self) -> Tensor:
        """Positions of this process that the experts computed for, fp64 scalar: padding counts where it costs rows."""
        if self.valid_T is None or self.routing.computes_padding:
            return torch.tensor(self.routing.num_tokens, dtype=torch.float64, device=self.routing.load_E.device)
        return self.valid_T.sum().double()

    @property
    def load_E(self) -> Tensor:
        """Assignments per expert before capacity, of all `ranks`, int64."""
        return self.total(self.routing.load_E)

    @property
    def importance_E(self) -> Tensor:
        """Summed weights per expert before capacity, of all `ranks`."""
        return self.total(self.routing.importance_E)

    @property
    def num_dropped(self) -> int:
        """Assignments that no expert computed because of capacity (whatever became of their tokens)."""
        return int(self.routing.load_E.sum() - self.kept.load_E.sum())

    @property
    def num_rerouted(self) -> int:
        """Assignments that another expert computed than the router chose."""
        if not isinstance(self.routing, Routing) or not isinstance(self.kept, Routing):
            return 0
        return int((self.kept.counted_N & (self.kept.expert_N != self.routing.expert_N)).sum())

    @property
    def num_unserved(self) -> int:
        """Tokens that no expert computed, padding left out."""
        unserved_T = self.kept.experts_per_token_T == 0
        return int((unserved_T if self.valid_T is None else unserved_T & self.valid_T).sum())
