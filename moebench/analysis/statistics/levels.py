"""The levels of all claims, and the numbers of seeds that they need."""

ALPHA = 0.05
"""Level of a family of comparisons, after Holm's correction."""
CONFIDENCE = 0.95
POWER = 0.8
MIN_SEEDS = 3
"""With fewer seeds, results are descriptive only."""
EQUIVALENCE_SEEDS = 5
"""With fewer seeds, no equivalence is claimed: at 3 seeds equal arms would be called so in 3 of 10 tables."""
EXACT_SEEDS = 6
"""With fewer seeds, the smallest possible sign-flip p is 2 / 2**5 = 0.0625."""
MAX_EXACT_SEEDS = 16
"""Limit of the sign-flip test, which enumerates 2**16 patterns; with more seeds the t-test suffices."""
