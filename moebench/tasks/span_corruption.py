"""Span corruption: an encoder reads a text with holes, a decoder says what was in them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebench.errors import require
from moebench.tasks.language import TextConfig, TextTask, Uniform
from moebench.tasks.task import TASKS, Batch, LabelKind, TaskFacts
from moebench.tasks.text.windows import PreparedText


@TASKS.register(
    TaskFacts(
        causal=True,
        metric="span_bits_per_byte",
        lower_is_better=True,
        data="the text of the task `language`, with the same splits",
        is_encoder_decoder=True,
    )
)
class SpanCorruption(TextTask):
    """T5's objective (arXiv:1910.10683, section 3.1.4) on an encoder-decoder model.

    Spans of tokens are taken out of a window and each is replaced by a sentinel, an id of its own. The target is each
    sentinel followed by the tokens that it stands for, and one sentinel more at the end. How many tokens and spans
    there are is fixed, as in T5's code, so that nothing has to be padded; where they are is a function of the seed and
    the step, fixed in evaluation. As there, a window begins with text and ends with a span.

    The metric is the code length of the whole target, sentinels too (they say where a span ends), over the bytes of
    the text in it: sentinels have none.
    """

    metric = "span_bits_per_byte"

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of span corruption; `sequence_length` is that of the text before anything is taken out."""

        name: str = "span_corruption"
        noise_density: float = 0.15
        """Share of the tokens that are taken out."""
        mean_span: float = 3.0
        """Tokens in a span, on average."""

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            super().__post_init__()
            require(0 < self.noise_density < 1, "task.noise_density", self.noise_density, "between 0 and 1")
            require(self.mean_span >= 1, "task.mean_span", self.mean_span, "at least 1")

        @property
        def num_noise(self) -> int:
            """Tokens that are taken out of a window: at least one is, and one stays."""
            length = self.sequence_length
            return min(max(round(length * self.noise_density), 1), length - 1)

        @property
        def num_spans(self) -> int:
            """Spans that they make: none is empty, and there is text before each."""
            wanted = max(round(self.num_noise / self.mean_span), 1)
            return min(wanted, self.num_noise, self.sequence_length - self.num_noise)

    def __init__(self, config: Any, text: PreparedText) -> None:
        super().__init__(config, text)
        self.sequence_length = config.sequence_length - config.num_noise + config.num_spans
        self.decoder_length = config.num_noise + config.num_spans + 1
        self.first_sentinel = text.vocab_size
        self.start = text.vocab_size + config.num_spans + 1
        self.vocab_size = self.start + 1
        # Each sentinel but the last, which is said and never read, and the start stand in every window.
        in_all = torch.full((config.num_spans,), text.train.num_windows)
        self.token_count_V = torch.cat([self.token_count_V, in_all, in_all.new_zeros(1), in_all[:1]])

    @staticmethod
    def decides(config: Any) -> tuple[object, ...]:
        """Return how much is taken out and in how many pieces."""
        return config.noise_density, config.mean_span

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Add whether a token is a sentinel: ST-MoE's encoder has experts for these (arXiv:2202.08906, section 7)."""
        return *super().label_kinds(), LabelKind(name="sentinel", values=("text", "sentinel"), read=self._sentinel_BL)

    def _sentinel_BL(self, batch: Batch) -> Tensor:
        is_sentinel_BL: Tensor = (batch.input_BL >= self.first_sentinel) & (batch.input_BL < self.start)
        return is_sentinel_BL.long()

    def make(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        """Take spans out of the tokens that `language` predicts in these windows."""
        noise_BL = noise_mask(self.config.sequence_length, self.config.num_noise, self.config.num_spans, uniform)
        input_BL, target_BP, byte_BP = corrupt(token_BM[:, 1:], byte_BM[:, 1:], noise_BL, self.first_sentinel)
        start_B1 = torch.full_like(target_BP[:, :1], self.start)
        return Batch(
            input_BL=input_BL,
            decoder_input_BP=torch.cat([start_B1, target_BP[:, :-1]], dim=1),
            target_BP=target_BP,
            weight_BP=byte_BP,
            domain_B=domain_B,
        )


def noise_mask(length: int, num_noise: int, num_spans: int, uniform: Uniform) -> Tensor:
    """Return which tokens are taken out, bool [B, length]: text and spans take turns, text first, all divisions alike.

    Published code: `random_spans_noise_mask` of T5.
    """
    text_BS = _divided(length - num_noise, num_spans, uniform)
    span_BS = _divided(num_noise, num_spans, uniform)
    end_BN = np.stack([text_BS, span_BS], axis=-1).reshape(len(text_BS), -1).cumsum(1)
    turns_BM = np.zeros((len(end_BN), length + 1), dtype=bool)  # no part is empty, so no two ends meet
    np.put_along_axis(turns_BM, end_BN, True, axis=1)
    return torch.from_numpy(np.logical_xor.accumulate(turns_BM[:, :length], axis=1))


def corrupt(token_BL: Tensor, byte_BL: Tensor, noise_BL: Tensor, first_sentinel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the encoder reads, what the decoder should say, and the bytes of each token of the latter.

    Every sequence begins with text and has as much noise in as many spans as the others.
    """
    # NumPy's calls on arrays this small take a third of torch's time, and the trainer waits for them.
    is_noise_BL, end_B1 = noise_BL.numpy(), np.zeros((len(token_BL), 1), dtype=np.int64)
    token_BM, byte_BM = (np.concatenate([found_BL.numpy(), end_B1], axis=1) for found_BL in (token_BL, byte_BL))
    input_BL, _ = _with_sentinels(token_BM[:, :-1], byte_BM[:, :-1], is_noise_BL, first_sentinel)
    # The target is the same with text and noise exchanged, and text behind the end: the last sentinel stands for it.
    is_text_BM = np.concatenate([~is_noise_BL, end_B1 == 0], axis=1)
    target_BP, byte_BP = _with_sentinels(token_BM, byte_BM, is_text_BM, first_sentinel)
    return torch.from_numpy(input_BL), torch.from_numpy(target_BP), torch.from_numpy(byte_BP)


def _with_sentinels(
    token_BL: np.ndarray, byte_BL: np.ndarray, out_BL: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens, and the bytes of each, with one sentinel of no bytes in the place of each stretch left out."""
    first_BL = out_BL.copy()
    first_BL[:, 1:] &= ~out_BL[:, :-1]
    kept_BL, shape = ~out_BL | first_BL, (len(token_BL), -1)
    said_BL = np.where(first_BL, first_sentinel - 1 + first_BL.cumsum(1), token_BL)
    return said_BL[kept_BL].reshape(shape), np.where(first_BL, 0, byte_BL)[kept_BL].reshape(shape)


def _divided(number: int, parts: int, uniform: Uniform) -> np.ndarray:
    """Return the sizes [B, parts] of a random division of `number` things in a row, no part empty."""
    cut_BC = np.sort(uniform(number - 1).numpy().argsort(1)[:, : parts - 1], axis=1) + 1
    zero_B1 = np.zeros_like(cut_BC, shape=(len(cut_BC), 1))
    return np.diff(np.concatenate([zero_B1, cut_BC, zero_B1 + number], axis=1))
