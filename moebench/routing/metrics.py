"""How evenly a router loads its experts: counts that add up, and metrics computed from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.ranks import Ranks, sum_together
from moebench.routing.values import LayerRecord

DEAD_SHARE = 0.01
"""An expert with less than this share of a uniform load is dead."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadCount:
    """Assignments and tokens of one layer; counts of several batches add up, layers are never pooled."""

    load_E: Tensor
    """Assignments per expert before capacity, int64."""
    num_dropped: int
    """Assignments lost to capacity, including those whose token passed on unchanged."""
    num_unserved: int
    """Tokens that no expert computed."""
    num_tokens: int
    num_rerouted: int = 0
    """Assignments computed by another expert than the router chose."""

    def __add__(self, other: "LoadCount") -> "LoadCount":
        """Add the counts of two batches of the same layer."""
        return LoadCount(
            load_E=self.load_E + other.load_E,
            num_dropped=self.num_dropped + other.num_dropped,
            num_unserved=self.num_unserved + other.num_unserved,
            num_tokens=self.num_tokens + other.num_tokens,
            num_rerouted=self.num_rerouted + other.num_rerouted,
        )

    @classmethod
    def from_record(cls, record: LayerRecord) -> "LoadCount":
        """Count the record of one layer, without padding."""
        num_tokens = record.routing.num_tokens if record.valid_T is None else int(record.valid_T.sum())
        return cls(
            load_E=record.routing.load_E,
            num_dropped=record.num_dropped,
            num_unserved=record.num_unserved,
            num_tokens=num_tokens,
            num_rerouted=record.num_rerouted,
        )


def sum_counts(counts: Sequence[LoadCount], ranks: Ranks) -> list[LoadCount]:
    """Return the counts of several layers, each summed over all ranks, on the CPU; one exchange for all of them."""
    tables = []
    for count in counts:
        scalars = (count.num_dropped, count.num_unserved, count.num_tokens, count.num_rerouted)
        tables.append(torch.cat([count.load_E, count.load_E.new_tensor(scalars)]))
    summed = [table.cpu() for table in sum_together(tables, ranks)]
    totals = []
    for table in summed:
        dropped, unserved, tokens, rerouted = (int(number) for number in table[-4:].tolist())
        totals.append(
            LoadCount(
                load_E=table[:-4], num_dropped=dropped, num_unserved=unserved, num_tokens=tokens, num_rerouted=rerouted
            )
        )
    return totals


def max_violation(load_E: Tensor) -> float:
    """Return max load / mean load - 1: 0 when even, E/k - 1 when k experts take all tokens (arXiv:2408.15664)."""
    load = load_E.double()
    return float(load.max() / load.mean() - 1) if load.sum() > 0 else 0.0


def coefficient_of_variation(load_E: Tensor) -> float:
    """Return the coefficient of variation of the load: standard deviation / mean, 0 when even."""
    load = load_E.double()
    return float(load.std(unbiased=False) / load.mean()) if load.sum() > 0 else 0.0


def compute_normalised_entropy(load_E: Tensor) -> float:
    """Return the entropy of the load divided by ln E: 1 when even, 0 when one expert takes all tokens."""
    if load_E.numel() == 1 or load_E.sum() == 0:
        return 1.0
    share = load_E.double() / load_E.sum()
    return float(-torch.special.xlogy(share, share).sum() / math.log(load_E.numel()))


def count_dead_experts(load_E: Tensor) -> int:
    """Return the number of experts with less than 1 % of a uniform load."""
    load = load_E.double()
    return int((load < DEAD_SHARE * load.mean()).sum()) if load.sum() > 0 else load.numel()


def label_parts(table_YE: Tensor) -> Tensor:
    """Return the contribution of each label to I(label; expert) of a table of counts, in nats, fp64 [labels], all ≥ 0.

    Label y contributes p(y) times the KL divergence of its experts from those of all tokens, Σ_e p(e|y) ln p(e|y) /
    p(e).
    """
    share_YE = table_YE.double() / table_YE.sum().clamp(min=1e-300)
    label_Y1, expert_E = share_YE.sum(1, keepdim=True), share_YE.sum(0)
    joint_YE, *marginal_YE = (torch.special.xlogy(share_YE, share) for share in (share_YE, label_Y1, expert_E))
    contribution_Y: Tensor = (joint_YE - marginal_YE[0] - marginal_YE[1]).sum(1)
    return contribution_Y.clamp(min=0)


def label_information(table_YE: Tensor) -> float | None:
    """Return I(label; expert) / H(label) of a table of counts: 1 if the expert determines the label, 0 if independent.

    Experts that each serve k of E equally frequent labels give 1 - ln k / ln E. None if all tokens have the same label.
    """
    share_Y = table_YE.double().sum(1) / table_YE.sum().clamp(min=1e-300)
    entropy = float(-torch.special.xlogy(share_Y, share_Y).sum())
    return min(float(label_parts(table_YE).sum()) / entropy, 1.0) if int((share_Y > 0).sum()) > 1 else None


def summarise_load(counts: Sequence[LoadCount]) -> dict[str, float]:
    """Return the load metrics of a model: computed per layer, then averaged over its MoE layers."""
    if not counts:
        return {}
    rows = [
        {
            "load/max_violation": max_violation(count.load_E),
            "load/cv": coefficient_of_variation(count.load_E),
            "load/entropy": compute_normalised_entropy(count.load_E),
            "load/dead_experts": float(count_dead_experts(count.load_E)),
            "load/drop_rate": count.num_dropped / max(int(count.load_E.sum()), 1),
            "load/reroute_rate": count.num_rerouted / max(int(count.load_E.sum()), 1),
            "load/unserved": count.num_unserved / max(count.num_tokens, 1),
        }
        for count in counts
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
