"""The values of a comparison on several axes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moebench.analysis import statistics as st
from moebench.analysis.fairness.run_curve import Axis
from moebench.analysis.fairness.speed_up import SpeedUp

Equal = Literal["tokens", "flops", "parameters", "seconds"]
"""What an arm and its reference have in common."""
EQUAL: tuple[Equal, ...] = ("tokens", "flops", "parameters", "seconds")
EQUAL_NAMES: Mapping[Equal, str] = {"tokens": "tokens", "flops": "FLOPs", "parameters": "parameters", "seconds": "time"}
AXIS_NAMES: Mapping[Axis, str] = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class EqualBudget:
    """An arm minus its reference where both have spent the same, over paired seeds."""

    pair: st.PairedDifference | None = None
    p_holm: float | None = None
    """Corrected for the number of arms on this axis."""
    problem: str = ""
    """Why there is no difference, in a few words; empty if there is one."""
    note: str = ""
    """What else must be known, in one sentence without a full stop."""

    def describe(self, *, lower_is_better: bool) -> str:
        """Return ahead, behind or undecided; the problem if there is no difference.

        Not better or worse: those are verdicts, on the test split and by more than this p value.
        """
        if self.pair is None or self.pair.num_seeds < st.MIN_SEEDS:
            return self.problem or "too few seeds"
        if self.p_holm is None or self.p_holm > st.ALPHA:
            return "undecided"
        return "ahead" if (self.pair.mean < 0) == lower_is_better else "behind"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        pair = self.pair
        return {
            "pairs": pair.num_seeds if pair else 0,
            "difference": pair.mean if pair else None,
            "interval": list(pair.interval) if pair and pair.interval else None,
            "p": pair.p if pair else None,
            "p_holm": self.p_holm,
            "problem": self.problem or None,
            "note": self.note or None,
        }


@dataclass(frozen=True, kw_only=True)
class ArmFairness:
    """One arm against the baseline on all axes."""

    arm: str
    seeds: tuple[int, ...]
    """Seeds that both arms have finished."""
    equal: Mapping[Equal, EqualBudget]
    speed_up: Mapping[Axis, SpeedUp]
    """Speed-up to the baseline's final quality; axes that were not measured or cannot be compared are left out."""
    divergence: str
    """2 of 5 diverged: the other seeds are a biased sample; else empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "seeds": list(self.seeds),
            "equal": {name: budget.to_dict() for name, budget in self.equal.items()},
            "speed_up": {axis: _speed_up_dict(speed_up) for axis, speed_up in self.speed_up.items()},
            "divergence": self.divergence or None,
        }


@dataclass(frozen=True, kw_only=True)
class ArmTotals:
    """Means over the finished seeds of what an arm spent; None where it is not known."""

    arm: str
    active_params: float | None
    total_params: float | None
    flops: float | None
    """Executed FLOPs of all training steps, forward and backward."""
    seconds: float | None
    """Duration of all training steps."""


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """Arms against the baseline, each with the same tokens, FLOPs, parameters and time, on the validation split."""

    metric: str
    lower_is_better: bool
    baseline: str
    arms: tuple[ArmFairness, ...]
    totals: tuple[ArmTotals, ...]
    num_evaluations: int
    """Fewest evaluations of a run."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "split": "validation",
            "metric": self.metric,
            "baseline": self.baseline,
            "num_evaluations": self.num_evaluations,
            "arms": {arm.arm: arm.to_dict() for arm in self.arms},
            "totals": {totals.arm: {k: v for k, v in asdict(totals).items() if k != "arm"} for totals in self.totals},
            "notes": list(self.notes),
        }


def _speed_up_dict(speed_up: SpeedUp) -> dict[str, Any]:
    return {
        "estimate": speed_up.estimate,
        "bound": speed_up.bound or None,
        "interval": list(speed_up.interval) if speed_up.interval else None,
        "ratios": {str(seed): ratio for seed, ratio in speed_up.ratios.items()},
        "never_reached": {str(seed): ratio for seed, ratio in speed_up.never.items()},
        "reached_before_first_evaluation": {str(seed): ratio for seed, ratio in speed_up.early.items()},
    }
