"""The JSON of a comparison."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moebench.analysis import statistics as st
from moebench.analysis.compare.design_report import build_design_values
from moebench.tasks.task import OUT_OF_DOMAIN

if TYPE_CHECKING:
    from moebench.analysis.compare.values import ArmSummary, Comparison, Difference


def build_json_values(comparison: "Comparison") -> dict[str, Any]:
    """Return JSON-ready values; the quality of an arm has the name of the metric as key."""
    axes = {arm: dict(labels) for arm, labels in comparison.axes.items()}
    return {
        "metric": comparison.metric,
        "split": comparison.split,
        "lower_is_better": comparison.lower_is_better,
        "baseline": comparison.baseline,
        "num_comparisons": comparison.num_comparisons,
        "margin": {"share_of_baseline": comparison.margin, "value": comparison.margin_value},
        "rare_bad_seeds": asdict(comparison.rare_bad_seeds) if comparison.rare_bad_seeds else None,
        "arms": {arm.arm: _arm_dict(comparison, arm) for arm in comparison.arms},
        "failed": [asdict(cell) for cell in comparison.failed],
        "missing": [asdict(cell) for cell in comparison.missing],
        "notes": list(comparison.notes),
        **({"axes": axes} if comparison.has_several_axes else {}),
        **({"tuning": comparison.tuning.to_dict()} if comparison.tuning else {}),
        "design": build_design_values(comparison),
        "trivial_baselines": [asdict(baseline) for baseline in comparison.trivial_baselines],
        "trivial_baselines_problem": comparison.trivial_problem or None,
        "below_trivial_baselines": comparison.is_below_trivial,
        "below_trivial_baselines_text": comparison.below_trivial_text or None,
    }


def _arm_dict(comparison: "Comparison", arm: "ArmSummary") -> dict[str, Any]:
    difference = comparison.find_difference(arm.arm)
    return {
        comparison.metric: _quality_dict(arm.mean, arm.interval, arm.values),
        OUT_OF_DOMAIN: _out_of_domain_dict(comparison, arm) if arm.out_of_domain else None,
        "difference": _difference_dict(comparison, difference) if difference else None,
        "load": arm.load,
        "throughput": {
            "tokens_per_s": arm.tokens_per_s,
            "share_of_baseline": arm.throughput_share,
            "mfu": arm.mfu,
        },
        "cost": arm.cost,
        "flops_vs_baseline": arm.flops_vs_baseline,
        "parallel": arm.parallel,
        "marks": list(arm.marks),
        "domains": arm.domains,
        "runs": {
            "done": arm.num_done,
            "failed": arm.num_failed,
            "diverged": arm.num_diverged,
            "missing": arm.num_missing,
        },
    }


def _out_of_domain_dict(comparison: "Comparison", arm: "ArmSummary") -> dict[str, Any]:
    pair = comparison.out_of_domain_difference(arm)
    interval = list(pair.interval) if pair and pair.interval else None
    difference = {"mean": pair.mean, "interval": interval} if pair else None
    quality = _quality_dict(arm.out_of_domain_mean, arm.out_of_domain_interval, arm.out_of_domain)
    return quality | {"difference": difference}


def _quality_dict(mean: float | None, interval: st.Interval | None, values: dict[int, float]) -> dict[str, Any]:
    seeds = {str(seed): value for seed, value in values.items()}
    return {"mean": mean, "interval": list(interval) if interval else None, "seeds": seeds}


def _difference_dict(comparison: "Comparison", difference: "Difference") -> dict[str, Any]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(difference).items()}
    del values["arm"]
    sentence = comparison.describe_difference(difference.arm)
    return values | {"low_power": difference.low_power, "sentence": sentence}
