"""The interface of models over tokens that benchmarks use, and what its implementations share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moebench.analysis.benchmarks.windows import Window
from moebench.errors import UsageError

HEAD_ROWS = 256
"""Positions whose logits over the vocabulary are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of a model on the targets of a window."""

    log_probability: float
    """Sum over the targets, in nats."""
    is_greedy: bool
    """Whether each target is the most probable token."""


class TextEncoder(Protocol):
    """How a model reads text."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""


class TokenModel(Protocol):
    """A causal model over tokens."""

    @property
    def encoder(self) -> TextEncoder:
        """How it reads text."""

    @property
    def max_length(self) -> int:
        """Tokens that it reads at once."""

    @property
    def start(self) -> tuple[int, ...]:
        """Tokens before every text, as in training; empty if there are none."""

    @property
    def previous(self) -> int:
        """The token before a text whose first token is predicted."""

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text."""

    @property
    def is_sequential(self) -> bool:
        """Whether it must read one sequence at a time, so that no sequence depends on another."""

    def find_domain(self, name: object) -> int:
        """Return the index of a domain, or of one that it was not trained on."""

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Return the score of each window of a batch."""

    def predict(self, windows: Sequence[Window]) -> list[int]:
        """Return the most probable token after the inputs of each window of a batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedInputs:
    """The inputs of a batch, padded on the right, where padding cannot change what comes before it."""

    token_BL: Tensor
    """int64."""
    valid_BL: Tensor | None
    """False at padding; None where there is none."""
    row_N: Tensor
    """The row of each of N positions after which something is predicted, window by window."""
    column_N: Tensor


def pad_inputs(windows: Sequence[Window], filler: int, *, only_last: bool = False) -> PaddedInputs:
    """Return the inputs of a batch; `only_last`: what is predicted is the token after each window."""
    lengths = [len(window.inputs) for window in windows]
    longest = max(lengths)
    token_BL = torch.tensor([[*window.inputs, *[filler] * (longest - len(window.inputs))] for window in windows])
    valid_BL = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    counts = [1 if only_last else len(window.targets) for window in windows]
    positions = [
        (row, column)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True))
        for column in range(length - count, length)
    ]
    row_N, column_N = torch.tensor(positions).unbind(1)
    return PaddedInputs(
        token_BL=token_BL, valid_BL=None if bool(valid_BL.all()) else valid_BL, row_N=row_N, column_N=column_N
    )


def score_targets(windows: Sequence[Window], vector_ND: Tensor, project: Callable[[Tensor], Tensor]) -> list[Score]:
    """Return the scores of windows from the vectors at their predicted positions, in the order of `PaddedInputs`.

    `project`: vectors to logits. Raises UsageError for values that are not finite.
    """
    target_N = torch.tensor([token for window in windows for token in window.targets], device=vector_ND.device)
    log_p, is_best = [], []
    for start in range(0, len(target_N), HEAD_ROWS):
        logits_RV = project(vector_ND[start : start + HEAD_ROWS]).float()
        target_R = target_N[start : start + HEAD_ROWS]
        log_p.append(logits_RV.log_softmax(-1).gather(1, target_R.unsqueeze(1)).squeeze(1))
        is_best.append(logits_RV.argmax(-1) == target_R)
    counts = [len(window.targets) for window in windows]
    sums = [part.sum() for part in torch.split(torch.cat(log_p).double(), counts)]
    if not bool(torch.stack(sums).isfinite().all()):
        raise UsageError("the model gives log-probabilities that are not finite")
    greedy = [bool(part.all()) for part in torch.split(torch.cat(is_best), counts)]
    return [Score(log_probability=float(value), is_greedy=best) for value, best in zip(sums, greedy, strict=True)]
