"""Texts on a model over tokens: continuations, whole texts, greedy generation; in batches that change no result."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from moebench.analysis.benchmarks.token_model import Score, TokenModel
from moebench.analysis.benchmarks.windows import Window, is_truncated, iter_batches, pair_windows, split_windows
from moebench.errors import UsageError

MAX_POSITIONS = 16_384
"""Tokens of a batch, padding included: bounds the memory for texts of any length."""
NOISE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A context and the continuation whose probability is computed."""

    context: str
    """Empty: the continuation begins the text."""
    continuation: str
    domain: object = None
    """Name of the domain of the text, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to be continued."""

    text: str
    until: tuple[str, ...]
    """Texts that end the continuation, which does not contain them."""
    max_tokens: int
    domain: object = None


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """The score of a continuation or of a text."""

    log_probability: float
    is_greedy: bool
    is_truncated: bool
    """Whether the beginning of its context was left out; False for a whole text, which is cut into windows."""


class TextModel:
    """Scores and continues texts; the results of a text do not depend on which others are in the call."""

    def __init__(self, model: TokenModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = 1 if model.is_sequential else batch_size

    def score_pairs(self, pairs: Sequence[TextPair]) -> list[PairScore]:
        """Return log p(continuation | context) of each pair, in nats, and whether greedy decoding would give it.

        A text begins with the tokens that begin one in training. Spaces at the end of a context count as the
        beginning of the continuation, and a continuation has the tokens that it has in the joined text, as in lm-eval.
        A token of the joined text that begins in the context and ends in the continuation is scored with it. Raises
        UsageError for a continuation without tokens, whose probability would be 1.
        """
        encoded = [self._encode_pair(pair) for pair in pairs]
        parts = [pair_windows(*tokens, self.model.max_length) for tokens in encoded]
        scores = self._score([self._build(part, pair.domain) for part, pair in zip(parts, pairs, strict=True)])
        return [
            _join(score, is_truncated(*tokens, self.model.max_length))
            for score, tokens in zip(scores, encoded, strict=True)
        ]

    def score_texts(self, texts: Sequence[str], domains: Sequence[object] | None = None) -> list[PairScore]:
        """Return log p of whole texts; of long ones in windows, as an evaluation of a run cuts its documents."""
        encoded = [self.model.encoder.encode(text) for text in texts]
        limit, domain_N = self.model.max_length, domains or [None] * len(texts)
        parts = [split_windows(self.model.previous, tokens, limit) for tokens in encoded]
        scores = self._score([self._build(part, domain) for part, domain in zip(parts, domain_N, strict=True)])
        return [_join(score, is_truncated=False) for score in scores]

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
        """Return the greedy continuation of each prompt, and whether the model read less than the whole prompt.

        At every step the model reads the last tokens that fit, of prompt and continuation together.
        """
        tokens = [[*self.model.start, *self.model.encoder.encode(prompt.text)] for prompt in prompts]
        tokens = [each or [self.model.previous] for each in tokens]
        lengths = [len(each) for each in tokens]
        texts = [""] * len(prompts)
        running = [index for index, prompt in enumerate(prompts) if prompt.max_tokens > 0]
        while running:
            windows = {
                index: self._window(tokens[index][-self.model.max_length :], (), prompts[index].domain)
                for index in running
            }
            for batch in iter_batches([*windows.values()], self.batch_size, MAX_POSITIONS):
                chosen = [running[position] for position in batch]
                for index, token in zip(chosen, self.model.predict([windows[i] for i in chosen]), strict=True):
                    tokens[index].append(token)
            ended = []
            for index in running:
                new = tokens[index][lengths[index] :]
                is_end = new[-1] in self.model.stops
                text = self.model.encoder.decode(new[:-1] if is_end else new)
                texts[index], is_stopped = _cut(text, prompts[index].until)
                if is_end or is_stopped or len(new) >= prompts[index].max_tokens:
                    ended.append(index)
            running = [index for index in running if index not in ended]
        return [(text, length > self.model.max_length) for text, length in zip(texts, lengths, strict=True)]

    def _encode_pair(self, pair: TextPair) -> tuple[list[int], list[int]]:
        """Return the tokens of context and continuation; the context has at least one."""
        encode, start = self.model.encoder.encode, [*self.model.start]
        context = pair.context.rstrip()
        tokens = encode(pair.context + pair.continuation)
        size = _count_common(encode(context) if context else [], tokens)
        if size == len(tokens):
            raise UsageError(
                f"the continuation {pair.continuation[:40]!r} after {pair.context[-40:]!r} has no tokens (allowed:"
                " texts that are not empty)"
            )
        return [*start, *tokens[:size]] or [self.model.previous], tokens[size:]

    def _build(self, parts: Sequence[tuple[Sequence[int], Sequence[int]]], domain: object) -> list[Window]:
        return [self._window(inputs, targets, domain) for inputs, targets in parts]

    def _window(self, inputs: Sequence[int], targets: Sequence[int], domain: object) -> Window:
        known = inputs[: len(inputs) - len(targets) + 1]  # what windows of one context have in common
        digest = hashlib.sha256(repr([int(token) for token in known]).encode()).digest()
        noise = int.from_bytes(digest[:NOISE_BYTES], "big") if self.model.is_sequential else 0
        return Window(inputs=tuple(inputs), targets=tuple(targets), domain=self.model.find_domain(domain), noise=noise)

    def _score(self, texts: Sequence[Sequence[Window]]) -> list[list[Score]]:
        """Return the scores of the windows of each text."""
        windows = [window for text in texts for window in text if window.targets]
        scores: list[Score | None] = [None] * len(windows)
        for batch in iter_batches(windows, self.batch_size, MAX_POSITIONS):
            for index, score in zip(batch, self.model.score([windows[i] for i in batch]), strict=True):
                scores[index] = score
        remaining = iter(score for score in scores if score is not None)
        return [[next(remaining) for window in text if window.targets] for text in texts]


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _join(scores: Sequence[Score], is_truncated: bool) -> PairScore:
    return PairScore(
        log_probability=sum(score.log_probability for score in scores),
        is_greedy=all(score.is_greedy for score in scores),
        is_truncated=is_truncated,
    )


def _cut(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first of the texts that end it, and whether there is one."""
    ends = [position for stop in until if stop and (position := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
