"""The trivial reference: a model that knows how frequent each token is in the training split, and no context."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebench.analysis.benchmarks.run_model import RunEncoder
from moebench.analysis.benchmarks.token_model import Score
from moebench.analysis.benchmarks.windows import Window
from moebench.tasks.language import Language

SMOOTHING = 0.5
"""Added to the count of every token, so that none is impossible (Jeffreys)."""


class UnigramModel:
    """Token frequencies of the training split as a model over tokens, whatever came before."""

    is_sequential = False

    def __init__(self, task: Language) -> None:
        self.encoder = RunEncoder(tokenizer=task.text.tokenizer)
        self.max_length = task.sequence_length
        self.previous = task.text.separator
        self.start: tuple[int, ...] = (self.previous,)
        self.stops = frozenset((self.previous,))
        count_V: Tensor = task.token_count_V.double() + SMOOTHING
        self.log_p_V = (count_V / count_V.sum()).log()
        self.best = int(self.log_p_V.argmax())

    def find_domain(self, name: object) -> int:
        """Return 0: frequencies are those of all domains together."""
        return 0

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Return the sum of the log-frequencies of the targets of each window."""
        return [
            Score(
                log_probability=float(self.log_p_V[torch.tensor(window.targets)].sum()),
                is_greedy=all(token == self.best for token in window.targets),
            )
            for window in windows
        ]

    def predict(self, windows: Sequence[Window]) -> list[int]:
        """Return the most frequent token for each window."""
        return [self.best] * len(windows)
