"""Permutations of labels that keep what makes neighbouring tokens similar: the nulls of information.

Tokens of one sequence are similar: their label may be the same (domain, class), and their experts follow each other. A
permutation of single tokens would ignore that, and call chance agreement of a few sequences information.
"""

import numpy as np

from moebench.analysis.specialisation.information import Ints, Permute


def permute_sequences(label_T: Ints, sequence_T: Ints) -> Permute:
    """Return a permutation for labels of tokens that lie sequence by sequence.

    A label that is constant in each sequence is exchanged between sequences. Other labels are rotated in each sequence
    by a random number of positions, and exchanged with those of another one, stretched to its length.
    """
    length_S = np.bincount(np.unique(sequence_T, return_inverse=True)[1])
    start_S = length_S.cumsum() - length_S
    first_S = label_T[start_S]
    if (np.repeat(first_S, length_S) == label_T).all():
        return lambda generator: np.repeat(generator.permutation(first_S), length_S)
    within_T = np.arange(len(label_T)) - np.repeat(start_S, length_S)

    def exchange(generator: np.random.Generator) -> Ints:
        other_S = generator.permutation(len(length_S))
        shift_S = (generator.random(len(length_S)) * length_S).astype(np.int64)
        rotated_T = (within_T + np.repeat(shift_S, length_S)) % np.repeat(length_S, length_S)
        # The middle of each position: the first label of a sequence would come too often.
        stretched_T = (2 * rotated_T + 1) * np.repeat(length_S[other_S], length_S) // np.repeat(2 * length_S, length_S)
        permuted_T: Ints = label_T[np.repeat(start_S[other_S], length_S) + stretched_T]
        return permuted_T

    return exchange


def permute_within(label_T: Ints, group_T: Ints, units_T: Ints) -> Permute:
    """Return a permutation of labels among units of the same group and size; tokens of a unit share label and group.

    With units of the same size alone, each group keeps its number of tokens of each label: with more even labels, a
    sample has more bias.
    """
    _, first_U, unit_T, size_U = np.unique(units_T, return_index=True, return_inverse=True, return_counts=True)
    label_U, group_U = label_T[first_U], group_T[first_U] * (int(size_U.max()) + 1) + size_U
    by_group_U = np.argsort(group_U, kind="stable")

    def permute(generator: np.random.Generator) -> Ints:
        shuffled_U = np.lexsort((generator.random(len(group_U)), group_U))
        moved_U = np.empty_like(label_U)
        moved_U[by_group_U] = label_U[shuffled_U]
        return moved_U[unit_T]

    return permute


def find_units(label_T: Ints, group_T: Ints, sequence_T: Ints) -> Ints:
    """Return the units of `permute_within`: the tokens of a sequence with the same group and label.

    All occurrences of a token in a document have its domain, and those that follow each other mostly the same part of
    the document; their experts are similar, so that single tokens must not be exchanged.
    """
    num_groups, num_labels = int(group_T.max(initial=0)) + 1, int(label_T.max(initial=0)) + 1
    units_T: Ints = (sequence_T * num_groups + group_T) * num_labels + label_T
    return units_T
