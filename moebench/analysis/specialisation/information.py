"""Information between experts and labels in bits, without the bias of a finite sample, beside its permutation null.

The estimate of I is (i - m) · c / (c - m): i is the plug-in value of the sample, m its mean over permutations of the
labels and c the largest value that the sample allows. It is 0 for independent labels and exact where experts determine
labels or labels experts: the adjustment of Vinh, Epps and Bailey (JMLR 11, 2010), with a permutation that keeps the
dependence inside sequences. docs/probing.md has its error beside that of other estimators.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Permute = Callable[[np.random.Generator], Ints]
"""Returns permuted labels of all tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignments:
    """The N assignments of T tokens to E experts in one layer."""

    token_N: Ints
    expert_N: Ints
    share_N: Floats | None = None
    """Size of each assignment; None: all are equal, as those of a hard router are."""
    num_tokens: int
    num_experts: int

    @cached_property
    def count_T(self) -> Floats:
        """Summed assignments of each token."""
        return np.bincount(self.token_N, self.share_N, self.num_tokens).astype(np.float64)

    @cached_property
    def expert_entropy(self) -> float:
        """H(expert) in bits: of the expert of an assignment drawn at random."""
        return compute_entropy(self.expert_N, self.num_experts, self.share_N)

    @cached_property
    def token_information(self) -> float:
        """I(token; expert) in bits, a token being one position of the data: what no label can exceed.

        H(expert) for one expert per token, about H(expert) - log2 k for k.
        """
        total = self.count_T.sum()
        share_N = np.ones(len(self.token_N)) if self.share_N is None else self.share_N
        given_N = share_N / self.count_T[self.token_N]
        logs_N = np.log2(given_N, out=np.zeros_like(given_N), where=given_N > 0)
        return max(self.expert_entropy + float((share_N * logs_N).sum() / total), 0.0) if total else 0.0


def compute_entropy(key_N: Ints, num_keys: int, share_N: Floats | None = None) -> float:
    """Return the plug-in entropy of keys 0 ... num_keys - 1 in bits."""
    if num_keys > 4 * len(key_N):  # a table of all keys would be mostly empty
        key_N = np.unique(key_N, return_inverse=True)[1]
    count_K = np.bincount(key_N, share_N)
    count_K = count_K[count_K > 0]
    total = count_K.sum()
    return max(float(np.log2(total) - (count_K * np.log2(count_K)).sum() / total), 0.0) if total else 0.0


def compute_plug_in(label_T: Ints, num_labels: int, assignments: Assignments) -> tuple[float, float]:
    """Return I(label; expert) of the sample and H(label), both over assignments and in bits."""
    label_N, num_experts = label_T[assignments.token_N], assignments.num_experts
    joint_N = label_N * num_experts + assignments.expert_N
    label_entropy = compute_entropy(label_N, num_labels, assignments.share_N)
    joint = compute_entropy(joint_N, num_labels * num_experts, assignments.share_N)
    return max(label_entropy + assignments.expert_entropy - joint, 0.0), label_entropy


@dataclass(frozen=True, kw_only=True)
class Information:
    """Information between the expert of an assignment and the label of its token, in bits."""

    plug_in: float
    """I of the sample, with its bias."""
    null: tuple[float, ...]
    """Information for each permutation of the labels."""
    label_entropy: float
    """H(label), given what the information is conditional on."""
    token_information: float
    """What the experts say about single tokens, given the same: the largest value of any label."""

    @property
    def ceiling(self) -> float:
        """The largest value that the sample allows."""
        return min(self.label_entropy, self.token_information)

    @property
    def corrected(self) -> float:
        """I in bits without bias: about 0 for independent labels."""
        return self._correct(self.plug_in)

    @property
    def null_interval(self) -> tuple[float, float]:
        """Central 95 % of the corrected values of permuted labels, in bits."""
        low, high = np.quantile([self._correct(value) for value in self.null], [0.025, 0.975])
        return float(low), float(high)

    @property
    def p(self) -> float:
        """Share of permutations, the sample among them, whose information is at least that of the sample."""
        tolerance = 1e-9
        return (1 + sum(value >= self.plug_in - tolerance for value in self.null)) / (1 + len(self.null))

    @property
    def of_label(self) -> float:
        """I / H(label): 1 if the expert determines the label."""
        return self.corrected / self.label_entropy if self.label_entropy > 0 else 0.0

    @property
    def of_routing(self) -> float:
        """I / I(token; expert): 1 if the label determines the experts, so that their entropy given it is 0."""
        return self.corrected / self.token_information if self.token_information > 0 else 0.0

    def _correct(self, value: float) -> float:
        mean = float(np.mean(self.null))
        room = self.ceiling - mean
        return (value - mean) * self.ceiling / room if room > 1e-6 * self.ceiling else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return JSON-ready values; names carry their unit."""
        return {
            "bits": self.corrected,
            "of_label": self.of_label,
            "of_routing": self.of_routing,
            "null_interval_bits": list(self.null_interval),
            "p": self.p,
            "plug_in_bits": self.plug_in,
            "null_mean_bits": float(np.mean(self.null)),
            "label_entropy_bits": self.label_entropy,
            "token_information_bits": self.token_information,
            "permutations": len(self.null),
        }


def measure_information(
    label_T: Ints, num_labels: int, assignments: Assignments, permute: Permute, sampling: tuple[int, int]
) -> Information:
    """Return I(label; expert) with its null under `permute`; `sampling`: number of permutations and seed."""
    num_permutations, seed = sampling
    generator = np.random.default_rng(seed)
    plug_in, label_entropy = compute_plug_in(label_T, num_labels, assignments)
    permuted = (permute(generator) for _ in range(num_permutations))
    return Information(
        plug_in=plug_in,
        null=tuple(compute_plug_in(other_T, num_labels, assignments)[0] for other_T in permuted),
        label_entropy=label_entropy,
        token_information=assignments.token_information,
    )


def measure_given(
    label_T: Ints,
    num_labels: int,
    assignments: Assignments,
    condition: tuple[Ints, int],
    permute: Permute,
    sampling: tuple[int, int],
) -> Information:
    """Return I(label; expert | condition) = I(label and condition; expert) - I(condition; expert).

    `condition`: the label of each token that it is conditional on, and their number. `permute` keeps that label.
    `sampling`: number of permutations and seed.
    """
    given_T, num_given = condition
    num_permutations, seed = sampling
    generator = np.random.default_rng(seed)
    offset_T, size = given_T * num_labels, num_labels * num_given
    known, given_entropy = compute_plug_in(given_T, num_given, assignments)
    joint, joint_entropy = compute_plug_in(offset_T + label_T, size, assignments)
    null = (compute_plug_in(offset_T + permute(generator), size, assignments)[0] for _ in range(num_permutations))
    return Information(
        plug_in=max(joint - known, 0.0),
        null=tuple(max(value - known, 0.0) for value in null),
        label_entropy=max(joint_entropy - given_entropy, 0.0),
        token_information=max(assignments.token_information - known, 0.0),
    )
