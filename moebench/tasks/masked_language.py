"""Masked language modelling: predict hidden tokens from both sides, as an encoder is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebench.errors import require
from moebench.tasks.language import TextConfig, TextTask, TokenHead, Uniform
from moebench.tasks.task import TASKS, Batch, TaskFacts, average_by_domain
from moebench.tasks.text.windows import PreparedText

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens: the share that becomes the mask token, and the share that becomes a random token."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="masked_bits_per_byte",
        lower_is_better=True,
        data="the text of the task `language`, with the same splits",
    )
)
class MaskedLanguage(TextTask):
    """BERT's masked language modelling (arXiv:1810.04805, section 3.1): every position sees the whole sequence.

    Each token is chosen with probability `rate`. Of the chosen ones 80 % become a mask token, 10 % a random token and
    10 % stay as they are; all of them are predicted, the others are not. BERT chooses exactly that share of each
    sequence and never a separator; here a token's luck is its own, and separators are text. The draw is a function of
    the seed and the step; in evaluation it is fixed.
    """

    metric = "masked_bits_per_byte"

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of the masked language task."""

        name: str = "masked_language"
        rate: float = 0.15
        """Share of the tokens that are hidden and predicted."""

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            super().__post_init__()
            require(0 < self.rate <= 1, "task.rate", self.rate, "greater than 0 and at most 1")

    def __init__(self, config: Any, text: PreparedText) -> None:
        super().__init__(config, text)
        self.mask = text.vocab_size
        self.vocab_size = text.vocab_size + 1
        num_masked = MASKED * config.rate * self.token_count_V.sum(dtype=torch.float64)
        self.token_count_V = torch.cat([self.token_count_V, num_masked.long().view(1)])

    @staticmethod
    def decides(config: Any) -> tuple[object, ...]:
        """Return the rate: at another one, more or less is left to guess from."""
        return (config.rate,)

    def make(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        """Hide some of the tokens that `language` predicts in these windows."""
        token_BL = token_BM[:, 1:]
        length = token_BL.shape[1]
        chosen_BL, fate_BL = uniform(length) < self.config.rate, uniform(length)
        other_BL = (uniform(length) * self.text.vocab_size).long()
        input_BL = token_BL.masked_fill(chosen_BL & (fate_BL < MASKED), self.mask)
        input_BL = input_BL.where(~chosen_BL | (fate_BL < MASKED) | (fate_BL >= MASKED + RANDOM), other_BL)
        return Batch(
            input_BL=input_BL,
            target_BP=token_BL,
            weight_BP=byte_BM[:, 1:],
            domain_B=domain_B,
            count_BP=chosen_BL.long(),
        )

    def text_of(self, batch: Batch) -> Tensor:
        """Return the text without masks: they hide where words begin."""
        return batch.target_BP

    def build_head(self, d_model: int) -> nn.Module:
        """Return the projection to the vocabulary of the text: nobody says the mask token."""
        return TokenHead(d_model, self.text.vocab_size, bias=False)

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Add to code length and bytes of the hidden tokens how many they are and how many are guessed right."""
        assert batch.count_BP is not None
        right_BP = (output.argmax(-1) == batch.target_BP) & (batch.count_BP > 0)
        return {**super().compute_sums(output, batch), "right": right_BP.sum(1), "hidden": batch.count_BP.sum(1)}

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return bits per byte of the hidden tokens, and the share of them whose best guess is right."""
        right, hidden = sums["right"], sums["hidden"]
        return super().compute_quality(sums) | average_by_domain(
            "masked_accuracy", right, hidden, self.domains, self.num_held_out
        )
