"""Texts longer than what a model was trained on, cut into windows; and batches of windows of similar length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens that a model reads at once, and those that it is to predict."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    """The tokens after the last `len(targets)` inputs."""
    domain: int = 0
    """Index into the domains of the data that the model was trained on."""
    noise: int = 0
    """Seed of what routers draw in evaluation; equal for windows that are compared with each other."""


def split_windows(previous: int, token_N: Sequence[int], max_length: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return inputs and targets such that each token is predicted once, from at most `max_length` tokens before it.

    `previous`: the token before the first one. Windows do not overlap; the last one alone begins earlier, so that its
    targets have as much context as there is. The windows are those of lm-eval's `get_rolling_token_windows`, and the
    full ones are those of an evaluation of a run.
    """
    stream = [previous, *token_N]
    windows: list[tuple[Sequence[int], Sequence[int]]] = []
    for start in range(0, len(token_N), max_length):
        end = min(start + max_length, len(token_N))
        windows.append((stream[max(end - max_length, 0) : end], token_N[start:end]))
    return windows


def pair_windows(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return inputs and targets of a continuation after a context of at least one token.

    The context is shortened from the left where both are longer than a model reads; of a continuation that is longer
    by itself, each part has the tokens before it as its context, as in `split_windows`.
    """
    if len(continuation) > max_length:
        return split_windows(context[-1], continuation, max_length)
    return [([*context, *continuation][-max_length - 1 : -1], continuation)]


def is_truncated(context: Sequence[int], continuation: Sequence[int], max_length: int) -> bool:
    """Return whether a model reads less than the whole context before every token of the continuation."""
    return len(context) + len(continuation) > max_length + 1


def iter_batches(windows: Sequence[Window], batch_size: int, max_positions: int) -> Iterator[list[int]]:
    """Yield indices of windows, longest first, in batches of at most `batch_size` windows and `max_positions` tokens.

    A window that is longer than `max_positions` is a batch of its own.
    """
    order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].inputs), index))
    start = 0
    while start < len(order):
        longest = max(len(windows[order[start]].inputs), 1)
        size = max(min(batch_size, max_positions // longest), 1)
        yield order[start : start + size]
        start += size
