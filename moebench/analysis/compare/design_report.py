"""The design of a comparison in its report: seeds that would settle undecided arms, and what pairing achieved."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moebench.analysis import statistics as st
from moebench.analysis.design.pairing import PairingGain, measure_pairing
from moebench.analysis.design.power import MAX_SEEDS, NeededSeeds, compute_needed_seeds
from moebench.reporting.formatting import MISSING, format_number, format_plural, format_signed
from moebench.reporting.table import Column, Table

if TYPE_CHECKING:
    from moebench.analysis.compare.values import Comparison

TOO_MANY = f"> {MAX_SEEDS}"
ALL_ARMS = "all arms"


def build_design_tables(comparison: "Comparison") -> tuple[Table, Table]:
    """Return the table of seeds that undecided arms need, and that of pairing; without rows where nothing is known."""
    return build_seeds_table(find_needed_seeds(comparison)), _build_pairing_table(comparison)


def build_seeds_table(needed: dict[str, NeededSeeds]) -> Table:
    """Return how many seeds would settle each undecided arm."""
    return Table(
        title="Seeds that would settle undecided arms, in 4 of 5 repeats",
        columns=_columns("if as observed", "for the margin", "if equal"),
        rows=tuple(
            (arm, *(_format_seeds(number) for number in (each.if_as_observed, each.for_margin, each.if_equal)))
            for arm, each in needed.items()
        ),
    )


def find_needed_seeds(comparison: "Comparison") -> dict[str, NeededSeeds]:
    """Return for each undecided arm how many seeds would settle it, the pairs of all arms assumed to vary equally."""
    margin, spread = comparison.margin_value, estimate_spread(comparison)
    if margin is None:
        return {}
    needed = {}
    for difference in comparison.differences:
        sd = spread.sd if spread else None
        if difference.verdict == "undecided" and difference.mean is not None and sd:
            needed[difference.arm] = compute_needed_seeds(
                difference.mean,
                sd,
                margin,
                num_seeds=len(difference.seeds),
                num_comparisons=comparison.num_comparisons,
            )
    return needed


def estimate_spread(comparison: "Comparison") -> st.SpreadEstimate | None:
    """Estimate the SD of paired differences from the arms with three common seeds, none of which diverged."""
    values = {
        arm.arm: arm.values for arm in comparison.arms if not arm.num_diverged and len(arm.values) >= st.MIN_SEEDS
    }
    baseline = values.pop(comparison.baseline, {})
    return st.pool_arms(values, baseline)


def measure_comparison_pairing(comparison: "Comparison") -> tuple[dict[str, PairingGain], float | None]:
    """Return the gain by pairing of each arm, and the variance ratio of all together."""
    values = {arm.arm: arm.values for arm in comparison.arms}
    baseline = values[comparison.baseline]
    return measure_pairing(
        {
            each.arm: ([values[each.arm][seed] for seed in each.seeds], [baseline[seed] for seed in each.seeds])
            for each in comparison.differences
        }
    )


def _build_pairing_table(comparison: "Comparison") -> Table:
    gains, together = measure_comparison_pairing(comparison)
    rows = [(arm, _format_correlation(gain.correlation), f"{gain.variance_ratio:.2f}") for arm, gain in gains.items()]
    if together is not None and len(rows) > 1:
        rows.append((ALL_ARMS, MISSING, f"{together:.2f}"))
    return Table(
        title=f"Pairing: each seed of an arm with the same seed of {comparison.baseline}",
        columns=_columns("correlation", "variance ratio"),
        rows=tuple(rows),
        is_detail=True,
    )


def explain_design(comparison: "Comparison") -> list[str]:
    """Return what the tables of the design mean, and what a longer run has to achieve where seeds are no way."""
    lines = []
    needed = find_needed_seeds(comparison)
    if needed:
        lines.append(
            f"Seeds that would settle an arm: with p at Holm's strictest level, 0.05 / {comparison.num_comparisons},"
            " all seeds planned from the start, the SD of the pairs as all arms together show it. if as observed: the"
            " true difference is the observed one, which is noisy, and so is this number; for the margin: it is as"
            f" large as the margin of equivalence, {100 * comparison.margin:.3g} % of the baseline's mean; if equal:"
            " there is none, and equivalence is shown."
        )
    lines += [
        f"{arm}: more than {MAX_SEEDS} seeds. A longer run settles it with"
        f" {format_plural(len(difference.seeds), 'seed')} if the SD of the pairs falls from {format_number(each.sd)} to"
        f" {format_number(each.sd_for_observed)} and the difference stays: an assumption, which no run here has tested."
        for difference in comparison.differences
        if (each := needed.get(arm := difference.arm)) and each.is_beyond_seeds and each.sd_for_observed > 0
    ]
    if measure_comparison_pairing(comparison)[0]:
        lines.append(
            "variance ratio: variance of the difference of unpaired seeds over that of paired ones; 1: pairing gained"
            " nothing, 3: one pair is worth three unpaired seeds of each arm."
        )
    return lines


def build_design_values(comparison: "Comparison") -> dict[str, Any]:
    """Return JSON-ready values."""
    gains, together = measure_comparison_pairing(comparison)
    spread = estimate_spread(comparison)
    plan = comparison.plan
    return {
        "planned_seeds": len(plan.planned) or None,
        "max_seeds": len(plan.final) or None,
        "levels": {difference.arm: difference.level for difference in comparison.differences},
        "paired_sd": spread.sd if spread else None,
        "needed_seeds": {arm: asdict(each) for arm, each in find_needed_seeds(comparison).items()},
        "pairing": {"arms": {arm: asdict(gain) for arm, gain in gains.items()}, "variance_ratio": together},
    }


def _columns(*headers: str) -> tuple[Column, ...]:
    return (Column(header="arm", align="left", wraps=True), *(Column(header=header) for header in headers))


def _format_correlation(correlation: float | None) -> str:
    return MISSING if correlation is None else format_signed(correlation, 2)


def _format_seeds(number: int | None) -> str:
    return TOO_MANY if number is None else str(number)
