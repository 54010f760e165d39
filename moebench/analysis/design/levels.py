"""The level of verdicts at a look: that of one test where all planned seeds are done, less at every other look.

| look | level of the family of arms |
|---|---|
| all planned seeds, none to be added | 0.05 |
| all planned seeds, before others are added as planned | O'Brien and Fleming's spending function at planned / maximum |
| the planned maximum | what remains of 0.05 |
| seeds that were announced after results, time i = 1, 2, ... | 0.01 / 2^i |
| any other seeds | 0.001 (Haybittle, doi:10.1259/0007-1285-44-526-793; Peto, doi:10.1038/bjc.1976.220) |
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moebench.analysis.design.boundaries import compute_second_level, spend
from moebench.analysis.statistics import ALPHA
from moebench.experiment.seed_plan import MIN_TESTED_SEEDS, SeedPlan

UNFORESEEN_ALPHA = 0.001
"""Level of an unplanned look: so small that many of them add little to the error of the others."""
EXTENSION_ALPHA = 0.01
"""Level of all looks announced after results, together: the experiment then has 6 % instead of 5 %."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """The level of a family of comparisons at a look, and what to say about it."""

    alpha: float
    note: str = ""
    """Empty for a look at all planned seeds if none will be added."""


def compute_level(plan: SeedPlan, seeds: Collection[int], num_comparisons: int = 1) -> Level:
    """Return the level of verdicts on the outcomes of these seeds; Holm's correction is applied within the look.

    `num_comparisons`: size of the family at the first look. A plan without seeds gives every look the full level.
    """
    if plan.is_lost:
        return _level(UNFORESEEN_ALPHA, "the record of the planned seeds was damaged")
    looked, planned, final = frozenset(seeds), frozenset(plan.planned), frozenset(plan.final)
    if not planned or (looked == planned == final):
        return Level(alpha=ALPHA)
    if looked == planned:
        alpha = spend(ALPHA, len(planned) / len(final))
        return _level(alpha, f"the first of two planned looks, at {len(planned)} and {len(final)} seeds")
    if looked == final and len(planned) >= MIN_TESTED_SEEDS:
        alpha = compute_final_level(len(planned), len(final), num_comparisons)
        return _level(alpha, f"the second of two planned looks, at {len(planned)} and {len(final)} seeds")
    if looked == final:  # the first look tests nothing
        return Level(alpha=ALPHA)
    for number, extension in enumerate(plan.extensions, start=1):
        if looked == frozenset(extension):
            added = f"seeds were added to the {len(final)} planned ones after looking, which a plan had to say before"
            return _level(EXTENSION_ALPHA / 2**number, added)
    return _level(UNFORESEEN_ALPHA, _describe_unplanned_look(looked, planned, final))


def compute_final_level(num_planned: int, num_final: int, num_comparisons: int) -> float:
    """Return the level of a family of tests at the second of two looks.

    It is that of the strictest single test times their number: those of fewer tests are larger, so that Holm's
    correction within the look keeps the level (group-sequential Holm, Ye et al., doi:10.1002/sim.5700).
    """
    number = max(num_comparisons, 1)
    first = spend(ALPHA, num_planned / num_final)
    return number * compute_second_level(ALPHA / number, first / number, num_planned, num_final)


def describe_levels(levels: Iterable[tuple[str, Level]]) -> list[str]:
    """Return a line for each level that is not the full one, with the arms that have it."""
    arms: dict[str, list[str]] = {}
    for arm, level in levels:
        if level.note:
            arms.setdefault(level.note, []).append(arm)
    if len(arms) == 1:
        return [f"verdicts at {note}" for note in arms]
    return [f"{', '.join(names)}: verdicts at {note}" for note, names in arms.items()]


def _level(alpha: float, reason: str) -> Level:
    return Level(alpha=alpha, note=f"the level {alpha:.2g} instead of {ALPHA:g}: {reason}")


def _describe_unplanned_look(looked: frozenset[int], planned: frozenset[int], final: frozenset[int]) -> str:
    number = len(looked)
    if looked < planned:
        return f"an early look, {number} of {len(planned)} planned seeds"
    if planned < looked < final:
        return f"a look between those that were planned, at {len(planned)} and {len(final)} seeds"
    if looked > final:
        return f"{number} seeds; {len(looked - final)} of them were added after looking, without announcing it"
    return f"other seeds than the {len(planned)} planned ones"
