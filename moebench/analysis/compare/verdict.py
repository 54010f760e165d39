"""The verdict on an arm: which of two families of tests it passes."""

from typing import Literal

from moebench.analysis import statistics as st

Verdict = Literal["better", "worse", "equivalent", "undecided", "diverged", "too few seeds", "not matched"]
DECIDED: tuple[Verdict, ...] = ("better", "worse", "equivalent")


def decide(
    pair: st.PairedDifference | None,
    p_holm: float | None,
    p_equivalence_holm: float | None,
    *,
    lower_is_better: bool,
    alpha: float = st.ALPHA,
) -> Verdict:
    """Return the verdict on a pair without divergence or mismatch, at level `alpha` of each family.

    The test for a difference comes first: an arm that is shown to be better by less than the margin is "better".
    """
    if pair is None or pair.num_seeds < st.MIN_SEEDS:
        return "too few seeds"
    if p_holm is not None and p_holm <= alpha:
        return "better" if (pair.mean < 0) == lower_is_better else "worse"
    return "equivalent" if p_equivalence_holm is not None and p_equivalence_holm <= alpha else "undecided"
