"""Whether experts of different seeds are the same: agreement of their assignments after the best matching."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student_t
from torch import Generator, Tensor

from moebench.analysis.dynamics.probe_set import ProbeSet, collect_memberships
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.seeds import make_generator

NUM_PERMUTATIONS = 20
"""Permutations of the tokens of one seed; each is matched again."""
MIN_SEEDS = 3
"""Below, there is no interval."""
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """One layer of two seeds."""

    seeds: tuple[int, int]
    matching: tuple[int, ...]
    """Expert of the first seed -> the expert of the second that is matched with it."""
    agreement: float
    """Share of assignments that go to matched experts in both seeds."""
    chance: float
    """Mean of that share, matched again, when the tokens of the second seed are in random order."""

    @property
    def corrected(self) -> float:
        """0 where two seeds agree by chance only, 1 where they are the same up to the numbers of experts."""
        return (self.agreement - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerAgreement:
    """One layer over all pairs of seeds."""

    pairs: tuple[PairAgreement, ...]
    interval: tuple[float, float] | None
    """Interval of the mean corrected agreement, over seeds, that holds for all layers together; None below three."""

    @property
    def agreement(self) -> float:
        """Mean over pairs."""
        return fmean(pair.agreement for pair in self.pairs)

    @property
    def chance(self) -> float:
        """Mean over pairs."""
        return fmean(pair.chance for pair in self.pairs)

    @property
    def corrected(self) -> float:
        """Mean over pairs."""
        return fmean(pair.corrected for pair in self.pairs)

    @property
    def verdict(self) -> str:
        """Whether seeds agree by more than chance, by the interval."""
        if self.interval is None:
            return "no interval"
        return "more than chance" if self.interval[0] > 0 else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "agreement": self.agreement,
            "chance": self.chance,
            "corrected": self.corrected,
            "interval": list(self.interval) if self.interval else None,
            "verdict": self.verdict,
            "pairs": [
                {
                    "seeds": list(pair.seeds),
                    "agreement": pair.agreement,
                    "chance": pair.chance,
                    "corrected": pair.corrected,
                    "matching": list(pair.matching),
                }
                for pair in self.pairs
            ],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedAgreement:
    """All layers of an arm."""

    arm: str
    seeds: tuple[int, ...]
    probe_set: ProbeSet
    layers: Mapping[str, LayerAgreement]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"seeds": list(self.seeds), "probe_set": self.probe_set.to_dict(), "layers": layers}


def measure_agreement(
    run: TrainedRun, others: Sequence[TrainedRun], num_tokens: int, on_progress: Callable[[int, int], None]
) -> SeedAgreement:
    """Route one probe set by all seeds and compare every two; raise UsageError where there is no other seed."""
    if not others:
        raise UsageError(
            f"--show agreement: no other seed of the arm '{run.arm}' is done in this results folder"
            " (allowed: two seeds or more; seeds=[0,1,2] of its experiment)"
        )
    runs = sorted([run, *others], key=lambda each: each.seed)
    probe_set = ProbeSet.draw(run.task, run.config.train.batch_size, num_tokens)
    members: dict[int, dict[str, Tensor]] = {}
    for number, each in enumerate(runs):
        on_progress(number, len(runs))
        members[each.seed] = collect_memberships(each.load_model(), probe_set, each.config)
    names = list(members[run.seed])
    layers = {
        layer: compare_seeds({seed: tables[layer] for seed, tables in members.items()}, layer, len(names))
        for layer in names
    }
    return SeedAgreement(arm=run.arm, seeds=tuple(members), probe_set=probe_set, layers=layers)


def compare_seeds(members: Mapping[int, Tensor], purpose: str = "", num_layers: int = 1) -> LayerAgreement:
    """Compare every two of the tables `member_TE` of several seeds, which are of the same tokens.

    `num_layers`: for how many layers together the interval holds.
    """
    generator = make_generator("seed agreement", purpose)
    pairs = tuple(
        compare_pair(members[first], members[second], (first, second), generator)
        for first, second in combinations(members, 2)
    )
    values = {pair.seeds: pair.corrected for pair in pairs}
    return LayerAgreement(pairs=pairs, interval=compute_pairs_interval(values, num_layers))


def compare_pair(first_TE: Tensor, second_TE: Tensor, seeds: tuple[int, int], generator: Generator) -> PairAgreement:
    """Match the experts of two routings of the same tokens, and those of routings that are independent."""
    matching, agreement = match_experts(first_TE, second_TE)
    permuted = [
        match_experts(first_TE, second_TE[torch.randperm(len(second_TE), generator=generator)])[1]
        for _ in range(NUM_PERMUTATIONS)
    ]
    return PairAgreement(seeds=seeds, matching=tuple(matching), agreement=agreement, chance=fmean(permuted))


def match_experts(first_TE: Tensor, second_TE: Tensor) -> tuple[list[int], float]:
    """Return the matching of experts with the most common tokens (Hungarian method), and the share of assignments.

    The share is 2 Σ |tokens of both matched experts| / (assignments of both routings).
    """
    common_EE = (first_TE.float().T @ second_TE.float()).numpy()  # exact: counts below 2^24
    rows, columns = linear_sum_assignment(common_EE, maximize=True)
    num_assignments = int(first_TE.sum()) + int(second_TE.sum())
    num_common = float(common_EE[rows, columns].astype(np.float64).sum())
    return columns.tolist(), 2 * num_common / num_assignments if num_assignments else 1.0


def compute_pairs_interval(
    values: Mapping[tuple[int, int], float], num_intervals: int = 1
) -> tuple[float, float] | None:
    """Return the interval of the mean over all pairs of seeds by the jackknife; None below three seeds.

    It covers, together with `num_intervals` - 1 others, with 95 % (Bonferroni).

    Pairs with a seed in common are not independent, so a seed is left out at a time with all its pairs. The mean over
    pairs is a U-statistic, for whose variance the jackknife is not too small on average (doi:10.1214/aos/1176345462).
    """
    seeds = sorted({seed for pair in values for seed in pair})
    number = len(seeds)
    if number < MIN_SEEDS:
        return None
    left_out = [fmean(value for pair, value in values.items() if seed not in pair) for seed in seeds]
    mean, center = fmean(values.values()), fmean(left_out)
    error = ((number - 1) / number * sum((value - center) ** 2 for value in left_out)) ** 0.5
    half_width = float(student_t.ppf(1 - (1 - LEVEL) / (2 * num_intervals), number - 1)) * error
    return mean - half_width, mean + half_width
