"""Target gain and source forgetting of arms, with intervals over seeds and tests that are corrected over the arms."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from moebench.analysis import statistics as st
from moebench.analysis.transfer.measure import RunTransfer


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference over paired seeds, with its p value and that corrected by Holm over the arms of the table."""

    mean: float
    interval: st.Interval | None
    p: float | None
    p_holm: float | None = None

    @classmethod
    def of(cls, pair: st.PairedDifference) -> "Change":
        """Return a paired difference whose p value is not corrected yet."""
        return cls(mean=pair.mean, interval=pair.interval, p=pair.p)


@dataclass(frozen=True, kw_only=True)
class ArmTransfer:
    """One arm over its finished seeds."""

    arm: str
    runs: tuple[RunTransfer, ...]
    gain: Change
    """Metric on the target, parent to run: positive where the run is better."""
    forgetting: Change | None
    """Metric on the sources, parent to run: positive where the run is worse. None without sources."""
    reference: str = ""
    """The arm of the baseline's kind that is equal in all other axes; empty: none."""
    reference_marks: tuple[str, ...] = ()
    """In what the arm is not matched with the reference, as the marks of `compare`."""
    gain_difference: Change | None = None
    """Gain minus that of the reference, over common seeds."""
    forgetting_difference: Change | None = None

    @property
    def target(self) -> tuple[str, ...]:
        """Domains of the target."""
        return self.runs[0].target

    @property
    def sources(self) -> tuple[str, ...]:
        """Domains of the sources."""
        return self.runs[0].sources

    @property
    def domain_changes(self) -> dict[str, float]:
        """Domain -> metric of the run minus that of its parent, mean over seeds."""
        domains = [name for name in self.runs[0].parent_domains if all(name in run.child_domains for run in self.runs)]
        return {
            name: fmean(run.child_domains[name] - run.parent_domains[name] for run in self.runs) for name in domains
        }

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of a field of `RunTransfer`; None where a seed has no value."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else fmean(values)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        names = ("parent_target", "child_target", "parent_source", "child_source")
        changes = ("gain", "forgetting", "gain_difference", "forgetting_difference")
        return {
            "seeds": [run.seed for run in self.runs],
            "target": list(self.target),
            "sources": list(self.sources),
            **{name: self.mean(name) for name in names},
            **{name: asdict(change) if (change := getattr(self, name)) else None for name in changes},
            "reference": self.reference or None,
            "reference_marks": list(self.reference_marks),
            "domains": self.domain_changes,
            "train_flops": {
                "parent": fmean(run.train_flops[0] for run in self.runs),
                "run": fmean(run.train_flops[1] for run in self.runs),
            },
            "by_seed": {str(run.seed): {name: getattr(run, name) for name in names} for run in self.runs},
        }


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The arms of an experiment that start from a trained model and are trained on other data."""

    metric: str
    arms: tuple[ArmTransfer, ...]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "metric": self.metric,
            "split": "test",
            "arms": {arm.arm: arm.to_dict() for arm in self.arms},
            "notes": list(self.notes),
        }


def summarise_arm(arm: str, runs: Sequence[RunTransfer], *, lower_is_better: bool) -> ArmTransfer:
    """Return an arm without its reference, its p values not corrected yet."""
    gains = [_order_by_direction(run.parent_target, run.child_target, lower_is_better=lower_is_better) for run in runs]
    gain = st.compute_paired_difference(*zip(*gains, strict=True))
    forgetting = None
    if all(run.parent_source is not None and run.child_source is not None for run in runs):
        losses = [
            _order_by_direction(run.child_source or 0.0, run.parent_source or 0.0, lower_is_better=lower_is_better)
            for run in runs
        ]
        forgetting = Change.of(st.compute_paired_difference(*zip(*losses, strict=True)))
    return ArmTransfer(arm=arm, runs=tuple(runs), gain=Change.of(gain), forgetting=forgetting)


def _order_by_direction(first: float, second: float, *, lower_is_better: bool) -> tuple[float, float]:
    """Return two values in the order whose difference is positive where the second is better than the first."""
    return (first, second) if lower_is_better else (second, first)


def compare_with_reference(
    arm: ArmTransfer, reference: ArmTransfer, *, lower_is_better: bool
) -> tuple[Change | None, Change | None]:
    """Return gain and forgetting of an arm minus those of another, over the seeds that both have."""
    ours, theirs = ({run.seed: run for run in each.runs} for each in (arm, reference))
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None, None
    sign = 1 if lower_is_better else -1

    def compare(first: str, second: str) -> Change | None:
        values = [
            [sign * (getattr(runs[seed], first) - getattr(runs[seed], second)) for seed in seeds]
            for runs in (ours, theirs)
            if all(getattr(runs[seed], name) is not None for seed in seeds for name in (first, second))
        ]
        return Change.of(st.compute_paired_difference(*values)) if len(values) == 2 else None

    return compare("parent_target", "child_target"), compare("child_source", "parent_source")


def correct_changes(changes: Mapping[str, Change | None]) -> dict[str, Change | None]:
    """Return changes with p values that are corrected over all of them."""
    p_values = {arm: change.p for arm, change in changes.items() if change is not None and change.p is not None}
    corrected = st.correct_family(p_values)
    return {
        arm: Change(mean=change.mean, interval=change.interval, p=change.p, p_holm=corrected.get(arm))
        if change is not None
        else None
        for arm, change in changes.items()
    }
