"""Forced alignment of a transcript with the positions of a recording by the best path of CTC."""

from collections.abc import Sequence

import numpy as np

from moebench.analysis.specialisation.information import Floats, Ints

BLANK = 0


def align_transcript(logp_LV: Floats, target: Sequence[int]) -> Ints:
    """Return the class at each of L positions on the most probable path that reads as the target.

    A path goes through blank, symbol 1, blank, symbol 2, ..., blank (Graves et al. 2006, section 4.1), and may skip a
    blank between different symbols. All positions are blank where the target does not fit into L positions.
    """
    state_Q = np.full(2 * len(target) + 1, BLANK, dtype=np.int64)
    state_Q[1::2] = target
    length, num_states = len(logp_LV), len(state_Q)
    may_skip_Q = np.zeros(num_states, dtype=bool)
    may_skip_Q[3::2] = state_Q[3::2] != state_Q[1:-2:2]
    best_Q = np.full(num_states, -np.inf)
    best_Q[:2] = logp_LV[0, state_Q[:2]]
    step_LQ = np.zeros((length, num_states), dtype=np.int64)
    for position in range(1, length):
        one_Q = np.concatenate([[-np.inf], best_Q[:-1]])
        two_Q = np.where(may_skip_Q, np.concatenate([[-np.inf, -np.inf], best_Q[:-2]])[:num_states], -np.inf)
        choice_3Q = np.stack([best_Q, one_Q, two_Q])
        step_LQ[position] = choice_3Q.argmax(0)
        best_Q = choice_3Q.max(0) + logp_LV[position, state_Q]
    state = num_states - 1 if num_states == 1 or best_Q[-1] >= best_Q[-2] else num_states - 2
    if not np.isfinite(best_Q[state]):
        return np.full(length, BLANK, dtype=np.int64)
    path_L = np.empty(length, dtype=np.int64)
    for position in reversed(range(length)):
        path_L[position] = state_Q[state]
        state -= step_LQ[position, state]
    return path_L
