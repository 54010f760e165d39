"""The values that a router, the MoE layer, the losses and the metrics exchange.

Shape letters: B batch, L length, T tokens (B·L), D model width, F expert hidden width, E experts, K experts per
token, C capacity, S slots, N assignments, R rows. Tensors carry them as a suffix; scalars carry none.
All values are frozen: a change is a new value, and nothing is stored on a module during forward, where the
recomputation of activation checkpointing would count it twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from moebench.ranks import SINGLE_RANK, Ranks
from moebench.routing.abstract import AbstractRouting, ExpertPass
from moebench.routing.layer_name import LayerName
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.reduction import divide_by_count, sum_with_count
from moebench.routing.sorting import SortedKeys, count_keys, sort_keys


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing(AbstractRouting):
    """Which token goes to which expert with which weight: a list of N assignments.

    One list of pairs represents token choice, expert choice, top-p, ReLU routing, hashing and dropping.
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
    """Which assignments keep a slot when an expert is over capacity: the highest; neighbours up to 8e-6 apart count as
    equal (`ranking.TOLERANCE`). None: those of earlier tokens."""
    top_k: int | None = None
    """K when the list is a token-major T×K rectangle, so that combine needs no index of each token's assignments."""
    kept_N: Tensor | None = None
    """bool: which assignments count; None: all. The others have weight 0 and no expert computes them."""
    chosen_N: Tensor | None = None
    """bool: which assignments are choices of the router at all; None: all. The others are never kept (`select`)."""
    rerouted_N: Tensor | None = None
    """bool: which assignments another expert computes than the router chose; None: none."""
    identity_weight_T: Tensor | None = None
    """fp32: weight of the token itself in the layer's output, for its assignments over capacity (`overflow: pass`);
    None: no token passes through."""
    _counts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # a `cached_property` locks
    computes_padding: ClassVar[bool] = False

    @classmethod
    def from_top_k(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        *,
        num_experts: int,
        logits_TE: Tensor | None = None,
        scores_TE: Tensor | None = None,
        token_extras: Mapping[str, Tensor] | None = None,
    ) -> Self:
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
            top_k=top_k,
            token_extras=token_extras or {},
        )

    @classmethod
    def from_table(
        cls,
        weight_TE: Tensor,
        chosen_TE: Tensor,
        *,
        logits_TE: Tensor | None = None,
        scores_TE: Tensor | None = None,
        token_extras: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Build the list from a table: each token goes to the experts where `chosen_TE` (bool) is true.

        All T·E pairs are listed, so that the length does not depend on data (see `keep`).
        """
        num_experts = weight_TE.shape[1]
        expert_TE = torch.arange(num_experts, device=weight_TE.device).expand(len(weight_TE), -1)
        tables = {"logits_TE": logits_TE, "scores_TE": scores_TE}
        pairs = cls.from_top_k(expert_TE, weight_TE, num_experts=num_experts, token_extras=token_extras, **tables)
        return replace(pairs, top_k=None).keep(chosen_TE.reshape(-1))

    @override
    def compute(self, experts: ExpertPass) -> Tensor:
        y_TD, x_TD, weight_T = experts.mix(self), experts.x_TD, self.identity_weight_T
        return y_TD if weight_T is None else y_TD + weight_T.to(x_TD.dtype).unsqueeze(-1) * x_TD

    @override
    def without_padding(self, valid_T: Tensor) -> Self:
        return self.keep(valid_T[self.token_N])

    @override
    def with_capacity(self, limit: Callable[["Routing"], "Routing"]) -> "Routing":
        return limit(self)

    def keep(self, kept_N: Tensor) -> Self:
        """Return the routing in which only the assignments where `kept_N` (bool) is true still count.

        The list keeps its length: its shape never depends on data, so the host does not wait for the device, and a
        rectangle stays one.
        """
        kept_N = kept_N if self.kept_N is None else kept_N & self.kept_N
        return replace(self, weight_N=self.weight_N.where(kept_N, 0.0), kept_N=kept_N)

    def compact(self) -> Self:
        """Return the routing with only the assignments that count; waits for the device."""
        if self.kept_N is None:
            return self
        return replace(self._take(self.kept_N.nonzero().squeeze(1)), top_k=None, kept_N=None, chosen_N=None)

    def slice_tokens(self, start: int, num_tokens: int) -> Self:
        """Return the routing of tokens start ... start + num_tokens - 1 alone; `extras` stay those of the batch."""
        end = start + num_tokens
        if self.top_k is None:
            index_N = ((self.token_N >= start) & (self.token_N < end)).nonzero().squeeze(1)  # waits for the device
        else:
            index_N = torch.arange(start * self.top_k, end * self.top_k, device=self.token_N.device)
        routing = self._take(index_N)
        return replace(
            routing,
            token_N=routing.token_N - start,
            num_tokens=num_tokens,
            logits_TE=None if self.logits_TE is None else self.logits_TE[start:end],
            scores_TE=None if self.scores_TE is None else self.scores_TE[start:end],
            token_extras={name: value_T[start:end] for name, value_T in self.token_extras.items()},
        )

    def _take(self, index_N: Tensor) -> Self:
        """Return the routing with the listed assignments at these indices."""
        lists = {each.name: getattr(self, each.name) for each in fields(self) if each.name.endswith("_N")}
        return replace(self, **{name: value_N[index_N] for name, value_N in lists.items() if value_N is not None})

    @property
    def counted_N(self) -> Tensor:
        """bool: which assignments count."""
        return torch.ones_like(self.expert_N, dtype=torch.bool) if self.kept_N is None else self.kept_N

    @property
    def choices_N(self) -> Tensor:
        """bool: which assignments the router chose, whether they still count or not."""
        return torch.ones_like(self.expert_N, dtype=torch.bool) if self.chosen_N is None else self.chosen_N

    def sort_by_expert(self) -> SortedKeys:
        """Sort the assignments by expert, those that do not count last; a kernel that sorts counts the load as well."""
        by_expert = sort_keys(self.expert_N, self.kept_N, self.num_experts, like=self.weight_N)
        if by_expert.count_Q is not None:
            self._counts["expert"] = by_expert.count_Q
        return by_expert

    @property
    def load_E(self) -> Tensor:
        """Assignments per expert, int64; counted once, for the experts, the losses and the metrics."""
        return self._count("expert", self.expert_N, self.num_experts)

    @property
    def rows_E(self) -> Tensor:
        """Rows that each expert computes: its assignments."""
        return self.load_E

    @property
    def importance_E(self) -> Tensor:
        """Summed weights per expert."""
        return self.weight_N.new_zeros(self.num_experts).index_add(0, self.expert_N, self.weight_N)

    @property
    def experts_per_token_T(self) -> Tensor:
        """Assignments per token, int64; 0 marks an unserved token."""
        return self._count("token", self.token_N, self.num_tokens)

    @property
    @override
    def num_rerouted(self) -> int:
        return 0 if self.rerouted_N is None else int(self.rerouted_N.sum())

    @override
    def tabulate_labels(self, label_T: Tensor, num_labels: int) -> Tensor:
        table_YE = torch.zeros(num_labels, self.num_experts, dtype=torch.float64, device=label_T.device)
        pair_N = label_T[self.token_N] * self.num_experts + self.expert_N
        return table_YE.view(-1).scatter_add(0, pair_N, self.counted_N.double()).view_as(table_YE)

    def _count(self, name: str, index_N: Tensor, size: int) -> Tensor:
        if name not in self._counts:
            self._counts[name] = count_keys(index_N, self.kept_N, size)
        return self._counts[name]


class ChainRouting(Routing):
    """All pairs of tokens and steps of a chain, in which every expert is a step; what counts are a token's own steps.

    The weight of step n is that of the state h_n behind it. The experts have computed when the routing is known: its
    router asks for each step (`RouteContext.advance`), so that no step can be left out for lack of a slot.
    """

    @override
    def compute(self, experts: ExpertPass) -> Tensor:
        # Σ_n w_n (h_n - x): what step n added counts by the weights of the steps from n on.
        weight_TE = self.weight_N.view(-1, self.num_experts)
        remaining_TE = weight_TE.flip(1).cumsum(1).flip(1)
        y_TD = torch.zeros_like(experts.added[0])
        for remaining_T, added_TD in zip(remaining_TE.unbind(1), experts.added, strict=True):
            y_TD = y_TD + remaining_T.unsqueeze(1).to(added_TD.dtype) * added_TD
        return y_TD

    @override
    def with_capacity(self, limit: Callable[[Routing], Routing]) -> Routing:
        return self


AnyRouting = Routing | SoftRouting | MergeRouting
"""What a router may return."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecord:
    """What happened in one MoE layer: losses and metrics are pure functions of it."""

    layer: LayerName = field(default_factory=LayerName)
    routing: AnyRouting
    """Before capacity."""
    kept: AnyRouting
    """After capacity: what the experts computed; the same assignments in the same order, some of them rerouted."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    sequence_length: int | None = None
    """Tokens of one sequence; T is a multiple of it. None: unknown."""
    flops_E: tuple[int, ...] = ()
    """Forward FLOPs of one row through each expert of the layer; empty: unknown, taken to be equal."""
    ranks: Ranks = SINGLE_RANK
    """Processes over whose tokens losses take their sums and means: all of them, or SINGLE_RANK."""
    defers_sums: bool = False
    """Whether `reduce_record` leaves the sums over processes to `resolve_losses`."""
    token_loss_T: Tensor | None = None
    """Task loss of each token in nats, without gradient; None until the task loss is known."""

    def total(self, value: Tensor) -> Tensor:
        """Return a sum over this process's tokens as one over the tokens of all `ranks`."""
        return self.ranks.sum(value)

    def mean(self, value_T: Tensor) -> Tensor:
        """Return the mean over tokens (the first dimension), without padding; 0 for no tokens at all."""
        return divide_by_count(self.total(sum_with_count(value_T, self.valid_T)), value_T.shape[1:])

    @property
    def num_positions(self) -> Tensor:
        """Positions of this process that the experts computed for, fp64 scalar: padding counts where it costs rows."""
        if self.valid_T is None or self.routing.computes_padding:
            return torch.full((), self.routing.num_tokens, dtype=torch.float64, device=self.routing.load_E.device)
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
        """Assignments that no expert computed because of capacity; tokens that passed through unchanged included."""
        return int(self.routing.load_E.sum() - self.kept.load_E.sum())

    @property
    def num_rerouted(self) -> int:
        """Assignments that another expert computed than the router chose."""
        return self.kept.num_rerouted

    @property
    def num_unserved(self) -> int:
        """Tokens that no expert computed, without padding."""
        unserved_T = self.kept.experts_per_token_T == 0
        return int((unserved_T if self.valid_T is None else unserved_T & self.valid_T).sum())
