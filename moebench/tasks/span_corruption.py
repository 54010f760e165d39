"""Span corruption: an encoder reads a text with spans removed, a decoder predicts the removed spans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moebench.ranges import AT_LEAST_1, Range
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.span_corruption import compute_span_baselines
from moebench.tasks.language import TextConfig, TextTask, Uniform
from moebench.tasks.task import TASKS, Batch, LabelKind, TaskFacts
from moebench.tasks.text.windows import PreparedText


@TASKS.register(
    TaskFacts(
        causal=True,
        metric="span_bits_per_byte",
        lower_is_better=True,
        data="the text of the task `language`, with the same splits",
        output="tokens",
        is_encoder_decoder=True,
    )
)
class SpanCorruption(TextTask):
    """T5's objective (arXiv:1910.10683, section 3.1.4) on an encoder-decoder model.

    Spans of tokens are removed from a window and each is replaced by a sentinel, an additional id. The target is each
    sentinel followed by the tokens that it replaced, and a last sentinel. As in T5's code, the number of removed tokens
    and of spans is fixed, so that nothing is padded, and a window begins with text and ends with a span. Positions of
    spans are a function of the seed and the step, fixed in evaluation.

    The metric is the code length of the whole target, including sentinels (they mark the end of a span), divided by the
    bytes of text in it: sentinels have no bytes.
    """

    metric = "span_bits_per_byte"

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of span corruption; `sequence_length` is that of the text before spans are removed."""

        RANGES: ClassVar[Mapping[str, Range]] = {
            "noise_density": Range(low=0, high=1, includes_low=False, includes_high=False),
            "mean_span": AT_LEAST_1,
        }

        name: str = "span_corruption"
        noise_density: float = 0.15
        """Share of the tokens that are removed."""
        mean_span: float = 3.0
        """Mean length of a span in tokens."""

        @property
        def num_noise(self) -> int:
            """Number of tokens removed from a window: at least one, and at least one remains."""
            length = self.sequence_length
            return min(max(round(length * self.noise_density), 1), length - 1)

        @property
        def num_spans(self) -> int:
            """Number of spans: none is empty, and each follows some text."""
            rounded = max(round(self.num_noise / self.mean_span), 1)
            return min(rounded, self.num_noise, self.sequence_length - self.num_noise)

    def __init__(self, config: Any, text: PreparedText) -> None:
        super().__init__(config, text)
        self.sequence_length = config.sequence_length - config.num_noise + config.num_spans
        self.decoder_length = config.num_noise + config.num_spans + 1
        self.first_sentinel = text.vocab_size
        self.start_id = text.vocab_size + config.num_spans + 1
        self.vocab_size = self.start_id + 1
        # Every window has the start id and each sentinel but the last, which is a target and never an input.
        per_window = torch.full((config.num_spans,), text.train.num_windows)
        self.token_count_V = torch.cat([self.token_count_V, per_window, per_window.new_zeros(1), per_window[:1]])

    @override
    @staticmethod
    def eval_options(config: Any) -> tuple[object, ...]:
        return config.noise_density, config.mean_span

    @override
    def label_kinds(self) -> tuple[LabelKind, ...]:
        # ST-MoE's encoder has experts for sentinels (arXiv:2202.08906, section 7).
        return *super().label_kinds(), LabelKind(name="sentinel", values=("text", "sentinel"), read=self._sentinel_BL)

    def _sentinel_BL(self, batch: Batch) -> Tensor:
        is_sentinel_BL: Tensor = (batch.input_BL >= self.first_sentinel) & (batch.input_BL < self.start_id)
        return is_sentinel_BL.long()

    @override
    def make_batch(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        noise_BL = noise_mask(self.config.sequence_length, self.config.num_noise, self.config.num_spans, uniform)
        input_BL, target_BP, byte_BP = corrupt(token_BM[:, 1:], byte_BM[:, 1:], noise_BL, self.first_sentinel)
        start_B1 = torch.full_like(target_BP[:, :1], self.start_id)
        return Batch(
            input_BL=input_BL,
            decoder_input_BP=torch.cat([start_B1, target_BP[:, :-1]], dim=1),
            target_BP=target_BP,
            weight_BP=byte_BP,
            domain_B=domain_B,
        )

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return compute_span_baselines(self, split)


def noise_mask(length: int, num_noise: int, num_spans: int, uniform: Uniform) -> Tensor:
    """Return which tokens are removed, bool [B, length]: text and spans alternate, text first.

    All divisions of text and noise into `num_spans` parts are equally likely. Published code: `random_spans_noise_mask`
    of T5.
    """
    text_BS = _random_partition(length - num_noise, num_spans, uniform)
    span_BS = _random_partition(num_noise, num_spans, uniform)
    end_BN = np.stack([text_BS, span_BS], axis=-1).reshape(len(text_BS), -1).cumsum(1)
    boundary_BM = np.zeros((len(end_BN), length + 1), dtype=bool)  # no part is empty, so no two ends meet
    np.put_along_axis(boundary_BM, end_BN, True, axis=1)
    return torch.from_numpy(np.logical_xor.accumulate(boundary_BM[:, :length], axis=1))


def corrupt(token_BL: Tensor, byte_BL: Tensor, noise_BL: Tensor, first_sentinel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input of the encoder, the target of the decoder, and the bytes of each target token.

    Every sequence begins with text, and all have the same number of removed tokens and of spans.
    """
    # NumPy's calls on arrays this small take a third of torch's time, and the trainer waits for them.
    is_noise_BL, end_B1 = noise_BL.numpy(), np.zeros((len(token_BL), 1), dtype=np.int64)
    token_BM, byte_BM = (np.concatenate([of_BL.numpy(), end_B1], axis=1) for of_BL in (token_BL, byte_BL))
    input_BL, _ = _replace_by_sentinels(token_BM[:, :-1], byte_BM[:, :-1], is_noise_BL, first_sentinel)
    # The target is the same with text and noise exchanged, and text appended: the last sentinel replaces it.
    is_text_BM = np.concatenate([~is_noise_BL, end_B1 == 0], axis=1)
    target_BP, byte_BP = _replace_by_sentinels(token_BM, byte_BM, is_text_BM, first_sentinel)
    return torch.from_numpy(input_BL), torch.from_numpy(target_BP), torch.from_numpy(byte_BP)


def _replace_by_sentinels(
    token_BL: np.ndarray, byte_BL: np.ndarray, removed_BL: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and the bytes of each, with one sentinel of no bytes in place of each removed span."""
    first_BL = removed_BL.copy()
    first_BL[:, 1:] &= ~removed_BL[:, :-1]
    kept_BL, shape = ~removed_BL | first_BL, (len(token_BL), -1)
    marked_BL = np.where(first_BL, first_sentinel - 1 + first_BL.cumsum(1), token_BL)
    return marked_BL[kept_BL].reshape(shape), np.where(first_BL, 0, byte_BL)[kept_BL].reshape(shape)


def _random_partition(number: int, parts: int, uniform: Uniform) -> np.ndarray:
    """Return the sizes [B, parts] of a random partition of `number` items into non-empty contiguous parts."""
    cut_BC = np.sort(uniform(number - 1).numpy().argsort(1)[:, : parts - 1], axis=1) + 1
    zero_B1 = np.zeros_like(cut_BC, shape=(len(cut_BC), 1))
    return np.diff(np.concatenate([zero_B1, cut_BC, zero_B1 + number], axis=1))
