"""Masked language modelling: predict masked tokens from the context on both sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.ranges import Range
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.masked_language import compute_masked_baselines
from moebench.tasks.deferred_logits import DeferredLogits, ModelOutput
from moebench.tasks.language import TextConfig, TextTask, TokenHead, Uniform
from moebench.tasks.task import TASKS, Batch, TaskFacts, average_by_domain
from moebench.tasks.text.windows import PreparedText

MASKED, RANDOM = 0.8, 0.1
"""Shares of the selected tokens that become the mask token and a random token."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="masked_bits_per_byte",
        lower_is_better=True,
        data="the text of the task `language`, with the same splits",
        output="tokens",
    )
)
class MaskedLanguage(TextTask):
    """BERT's masked language modelling (arXiv:1810.04805, section 3.1): every position sees the whole sequence.

    Each token is selected with probability `rate`. 80 % of the selected tokens become the mask token, 10 % a random
    token and 10 % stay unchanged; only selected tokens are predicted. BERT selects exactly that share of each sequence
    and never a separator; here tokens are selected independently, and separators count as text. The selection is a
    function of the seed and the step; in evaluation it is fixed.
    """

    metric = "masked_bits_per_byte"

    @dataclass(frozen=True, kw_only=True)
    class Config(TextConfig):
        """Options of the masked language task."""

        RANGES: ClassVar[Mapping[str, Range]] = {"rate": Range(low=0, high=1, includes_low=False)}

        name: str = "masked_language"
        rate: float = 0.15
        """Share of the tokens that are masked and predicted."""

    def __init__(self, config: Any, text: PreparedText) -> None:
        super().__init__(config, text)
        self.mask_id = text.vocab_size
        self.vocab_size = text.vocab_size + 1
        num_masked = MASKED * config.rate * self.token_count_V.sum(dtype=torch.float64)
        self.token_count_V = torch.cat([self.token_count_V, num_masked.long().view(1)])

    @override
    @staticmethod
    def eval_options(config: Any) -> tuple[object, ...]:
        return (config.rate,)

    @override
    def make_batch(self, token_BM: Tensor, byte_BM: Tensor, domain_B: Tensor, uniform: Uniform) -> Batch:
        token_BL = token_BM[:, 1:]  # those that `language` predicts in the same windows
        length = token_BL.shape[1]
        selected_BL, action_BL = uniform(length) < self.config.rate, uniform(length)
        random_BL = (uniform(length) * self.text.vocab_size).long()
        input_BL = token_BL.masked_fill(selected_BL & (action_BL < MASKED), self.mask_id)
        input_BL = input_BL.where(~selected_BL | (action_BL < MASKED) | (action_BL >= MASKED + RANDOM), random_BL)
        return Batch(
            input_BL=input_BL,
            target_BP=token_BL,
            weight_BP=byte_BM[:, 1:],
            domain_B=domain_B,
            count_BP=selected_BL.long(),
            document_BL=self.documents_of(token_BL),
        )

    @override
    def context_tokens(self, batch: Batch) -> Tensor:
        return batch.target_BP  # the text without masks, which hide where words begin

    @override
    def build_head(self, d_model: int) -> nn.Module:
        return TokenHead(d_model, self.text.vocab_size, bias=False)  # the mask token is never a target

    @override
    def compute_sums(self, output: ModelOutput, batch: Batch) -> Mapping[str, Tensor]:
        assert batch.count_BP is not None
        best_BP = output.argmax() if isinstance(output, DeferredLogits) else output.argmax(-1)
        correct_BP = (best_BP == batch.target_BP) & (batch.count_BP > 0)
        return {**super().compute_sums(output, batch), "correct": correct_BP.sum(1), "masked": batch.count_BP.sum(1)}

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        correct_D, masked_D = sums["correct"], sums["masked"]
        accuracy = average_by_domain("masked_accuracy", correct_D, masked_D, self.domains, self.num_held_out)
        return super().compute_quality(sums) | accuracy

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return compute_masked_baselines(self, split)
