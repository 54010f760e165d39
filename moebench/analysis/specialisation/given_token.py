"""Information given the token's id, where the sample can tell it from chance."""

import numpy as np

from moebench.analysis.specialisation.information import Assignments, Information, Ints, measure_given
from moebench.analysis.specialisation.permutations import find_units, permute_within
from moebench.analysis.specialisation.token_labels import LabelColumn

MIN_SEQUENCES = 32
"""With fewer, experts that are similar inside a sequence too often pass for information about domains."""
MAX_CHANCE = 0.95
"""Part of the largest possible value that permuted labels may have: the correction divides errors by 1 minus it."""
LEAST_BITS = 1e-9
"""Bits of a label, given the token, or between two permutations of it, that count as none."""


def measure_given_token(
    column: LabelColumn,
    assignments: Assignments,
    token_ids: tuple[Ints, int],
    sequence_T: Ints,
    sampling: tuple[int, int],
) -> Information | None:
    """Return I(label; expert | token id); None where the token determines the label, or repeats too seldom for a null.

    `token_ids`: the id of each token, and their number. `sampling`: number of permutations and seed.
    """
    label_T, (id_T, _) = column.label_T, token_ids
    if column.name == "token_id":
        return None
    permute = permute_within(label_T, id_T, find_units(label_T, id_T, sequence_T))
    given = measure_given(label_T, len(column.values), assignments, token_ids, permute, sampling)
    is_determined = given.label_entropy < LEAST_BITS
    return None if is_determined or not _has_null(given, len(np.unique(sequence_T))) else given


def _has_null(given: Information, num_sequences: int) -> bool:
    """Return whether permuted labels show what chance gives: 0 if the token determines the experts, else a range."""
    mean = sum(given.null) / len(given.null)
    if mean < LEAST_BITS:
        return True
    is_fixed = len(given.null) > 1 and max(given.null) - min(given.null) < LEAST_BITS
    return num_sequences >= MIN_SEQUENCES and not is_fixed and mean <= MAX_CHANCE * given.ceiling
