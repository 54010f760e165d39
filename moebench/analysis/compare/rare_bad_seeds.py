"""A warning where the seeds of some arms are far worse than their others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from moebench.analysis import statistics as st

if TYPE_CHECKING:
    from moebench.analysis.compare.values import ArmSummary

MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class RareBadSeeds:
    """The seeds that stand out to the bad side, in tables whose noise is skewed to it."""

    p: float
    """p value of the skewness of all arms together, under normal noise."""
    seeds: tuple[tuple[str, int], ...]
    """Arm and worst seed of the most skewed arms."""

    def describe(self) -> str:
        """Return the warning as one line without a full stop."""
        named = ", ".join(f"{arm} seed {seed}" for arm, seed in self.seeds)
        return (
            f"rare bad seeds: values scatter further to the bad side than to the good (most: {named}; p"
            f" {self.p:.2g}, which normal noise goes below in 1 of 20 tables)"
        )


def find_rare_bad_seeds(arms: Sequence["ArmSummary"], *, lower_is_better: bool) -> RareBadSeeds | None:
    """Return a warning if the values of the arms, over their common seeds, are skewed to the bad side."""
    varied = [arm for arm in arms if len(arm.seeds) >= st.MIN_SEEDS]
    seeds = [seed for seed in (varied[0].seeds if varied else ()) if all(seed in arm.values for arm in varied)]
    badness = {arm.arm: np.array([arm.values[seed] for seed in seeds]) for arm in varied}
    badness = {name: x_S if lower_is_better else -x_S for name, x_S in badness.items() if st.compute_variance(x_S) > 0}
    if len(seeds) < st.MIN_SEEDS or not badness:
        return None
    p = float(st.skewness_p(list(badness.values())))
    if p > st.ALPHA:
        return None
    skewed = sorted(badness, key=lambda name: -float(stats.skew(badness[name])))[:MAX_NAMED]
    return RareBadSeeds(p=p, seeds=tuple((name, seeds[int(badness[name].argmax())]) for name in skewed))
