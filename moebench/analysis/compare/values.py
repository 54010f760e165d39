"""The values of a comparison: a summary of each arm, its difference to the baseline, the cells without a result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from moebench.analysis import statistics as st
from moebench.analysis.compare.json_values import build_json_values
from moebench.analysis.compare.rare_bad_seeds import RareBadSeeds
from moebench.analysis.compare.sentences import describe_difference
from moebench.analysis.compare.verdict import Verdict
from moebench.experiment.seed_plan import SeedPlan
from moebench.experiment.tuning import TuningState
from moebench.runs.trivial_baselines import BELOW_TRIVIAL, find_reference, is_below_trivial
from moebench.schema import DEFAULT_MARGIN
from moebench.tasks.baselines.baseline import TrivialBaseline

BEST = "best"
NON_CAUSAL = "non-causal"
Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class ComparisonMetric:
    """The metric and the split that arms are compared by.

    Settings are chosen on the validation split, claims are made on the test split.
    """

    name: str
    lower_is_better: bool
    split: Split = "test"
    margin: float = DEFAULT_MARGIN
    """Differences below this share of the baseline's mean count as equivalence."""


BITS_PER_BYTE = ComparisonMetric(name="bits_per_byte", lower_is_better=True)


@dataclass(frozen=True, kw_only=True)
class LostCell:
    """An expected cell without a usable result, with the reason."""

    arm: str
    seed: int
    id: str
    reason: str
    diverged: bool
    """Whether a value was not finite in training or evaluation: an outcome of the arm, unlike other failures."""


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over its finished seeds: quality, load, speed, cost; None before the first finished run."""

    arm: str
    seeds: tuple[int, ...]
    num_failed: int
    num_diverged: int
    """Counted in `num_failed` too."""
    num_missing: int
    mean: float | None
    interval: st.Interval | None
    values: dict[int, float]
    """Seed -> final metric."""
    out_of_domain: dict[int, float]
    """Seed -> the same metric over the domains held out of training; empty if there are none."""
    domains: dict[str, float]
    load: dict[str, float]
    """Over the domains of training; names that end in /out_of_domain: over those held out."""
    tokens_per_s: float | None
    throughput_share: float | None
    """Ratio of the medians over common seeds, baseline = 1."""
    mfu: float | None
    """Mean over seeds; None where no run knows the peak of its devices."""
    cost: dict[str, float]
    flops_vs_baseline: dict[str, float]
    """Executed FLOPs per token over the baseline's, in "training" and "evaluation"; empty where unknown."""
    parallel: dict[str, float]
    """Cost of communication between processes; empty for one process."""
    marks: tuple[str, ...]

    @property
    def out_of_domain_mean(self) -> float | None:
        """Mean over seeds of the metric out of domain; None where no domain was held out."""
        return fmean(self.out_of_domain.values()) if self.out_of_domain else None

    @property
    def out_of_domain_interval(self) -> st.Interval | None:
        """95 % t interval of `out_of_domain_mean` over seeds."""
        return st.mean_interval(list(self.out_of_domain.values())) if self.out_of_domain else None

    @property
    def information(self) -> dict[str, float]:
        """Kind of label -> I(label; expert) / H(label), over the domains of training."""
        names = {name: name.split("/") for name in self.load}
        return {
            parts[1]: self.load[name] for name, parts in names.items() if parts[0] == "information" and len(parts) == 2
        }

    @property
    def num_done(self) -> int:
        """Number of finished runs with a finite metric."""
        return len(self.seeds)

    @property
    def num_planned(self) -> int:
        """Number of seeds in the grid."""
        return self.num_done + self.num_failed + self.num_missing


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm minus the baseline over common seeds, in the unit of the metric.

    `verdict` follows `p_holm`, then `p_equivalence_holm`, unless a seed of either arm diverged: the others are then no
    fair sample.
    """

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    mean: float | None
    interval: st.Interval | None
    """95 % t interval, by itself."""
    simultaneous_interval: st.Interval | None = None
    """Interval that holds for all arms together in 95 % of repeats (Bonferroni)."""
    p: float | None
    """p value of the paired t-test, from the noise of these pairs alone."""
    p_pooled: float | None = None
    """p value from the noise of the whole table, so that an arm does not gain from a few seeds that happen to agree."""
    p_holm: float | None
    """The larger of `p` and `p_pooled`, corrected over the arms."""
    p_exact: float | None
    p_equivalence: float | None = None
    """p value of the two one-sided tests (TOST) against the margin; None below five seeds."""
    p_equivalence_holm: float | None = None
    effect_sd: float | None
    """The difference in units of the seed SD, with Hedges' correction."""
    effect_interval: st.Interval | None = None
    smallest_detectable: float | None
    verdict: Verdict
    level: float = st.ALPHA
    """Level of the verdict: below the full level at a look that was not planned."""

    @property
    def is_within_margin(self) -> bool:
        """Whether the difference is shown to be smaller than the margin, whatever the verdict."""
        return self.p_equivalence_holm is not None and self.p_equivalence_holm <= self.level

    @property
    def low_power(self) -> bool:
        """Three to five seeds: enough for an interval, too few to see small effects."""
        return st.MIN_SEEDS <= len(self.seeds) < st.EXACT_SEEDS


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The arms of a grid of runs, compared; the grid may be half finished."""

    metric: str
    lower_is_better: bool
    baseline: str
    arms: tuple[ArmSummary, ...]
    differences: tuple[Difference, ...]
    failed: tuple[LostCell, ...]
    missing: tuple[LostCell, ...]
    notes: tuple[str, ...]
    split: Split = "test"
    margin: float = DEFAULT_MARGIN
    """Differences below this share of the baseline's mean count as equivalence."""
    plan: SeedPlan = field(default_factory=SeedPlan)
    """Seeds that were planned."""
    trivial_baselines: tuple[TrivialBaseline, ...] = ()
    """What trivial methods reach on the same split; empty where the task has none or they cannot be computed."""
    trivial_problem: str = ""
    """Why the trivial baselines cannot be shown, in one line; empty if they can."""
    tuning: TuningState | None = None
    """What each arm has chosen on validation before; None without tuning."""
    axes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Arm -> grid key -> label of its value, without keys that mean nothing to the arm."""
    rare_bad_seeds: RareBadSeeds | None = None
    """The seeds that stand out, where the noise of the table is skewed to the bad side."""
    varies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> configuration key in which arms differ -> value."""

    @property
    def has_several_axes(self) -> bool:
        """Whether arms differ in several keys of the grid."""
        return max(map(len, self.axes.values()), default=0) > 1

    @property
    def reference(self) -> TrivialBaseline | None:
        """The trivial baseline that the baseline arm must beat."""
        return find_reference(self.trivial_baselines, self.metric)

    @property
    def is_below_trivial(self) -> bool | None:
        """Whether the baseline arm does not beat the reference; None where either is unknown."""
        mean = next(arm.mean for arm in self.arms if arm.arm == self.baseline)
        return is_below_trivial(mean, self.trivial_baselines, self.metric, lower_is_better=self.lower_is_better)

    @property
    def below_trivial_text(self) -> str:
        """The mark of an experiment whose baseline arm does not beat the reference; else empty."""
        return BELOW_TRIVIAL if self.is_below_trivial else ""

    @property
    def num_comparisons(self) -> int:
        """Size of the family of differences that Holm corrects for."""
        return sum(difference.p is not None for difference in self.differences)

    @property
    def num_equivalence_tests(self) -> int:
        """Size of the family of equivalence tests that Holm corrects for."""
        return sum(difference.p_equivalence is not None for difference in self.differences)

    @property
    def margin_value(self) -> float | None:
        """The margin of equivalence in the unit of the metric; None before the baseline has a mean."""
        mean = next(arm.mean for arm in self.arms if arm.arm == self.baseline)
        return None if mean is None else self.margin * abs(mean)

    def out_of_domain_difference(self, arm: ArmSummary) -> st.PairedDifference | None:
        """Return the arm minus the baseline out of domain over common seeds; None for the baseline, or without any."""
        baseline = next(other.out_of_domain for other in self.arms if other.arm == self.baseline)
        seeds = [seed for seed in arm.out_of_domain if seed in baseline]
        if arm.arm == self.baseline or not seeds:
            return None
        return st.compute_paired_difference(
            [arm.out_of_domain[seed] for seed in seeds], [baseline[seed] for seed in seeds]
        )

    def find_difference(self, arm: str) -> Difference | None:
        """Return the difference of an arm to the baseline; None for the baseline itself."""
        return next((difference for difference in self.differences if difference.arm == arm), None)

    def describe_verdict(self, arm: str) -> str:
        """Return the verdict on an arm as tables and figures show it: with the number of seeds that diverged."""
        diverged = {summary.arm: _describe_divergence(summary) for summary in self.arms}
        arm_diverged = diverged.get(arm, "")
        difference = self.find_difference(arm)
        verdict = "baseline" if difference is None else difference.verdict
        if verdict == "diverged":
            return arm_diverged or f"baseline: {diverged.get(self.baseline, '')}"
        return f"{verdict}, {arm_diverged}" if arm_diverged and verdict in ("baseline", "not matched") else verdict

    def describe_difference(self, arm: str) -> str:
        """Return the verdict on an arm as one sentence for a paper, with numbers and tests; empty for the baseline."""
        return describe_difference(self, arm)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; the quality of an arm has the name of the metric as key."""
        return build_json_values(self)


def _describe_divergence(arm: ArmSummary) -> str:
    return f"{arm.num_diverged} of {arm.num_planned} diverged" if arm.num_diverged else ""
