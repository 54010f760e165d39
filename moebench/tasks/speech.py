"""Speech recognition: transcribe a recording by connectionist temporal classification (CTC)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.tasks.audio.task import AudioConfig, AudioTask
from moebench.tasks.audio.transcripts import collapse_path, count_character_errors, count_word_errors
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.transcription import compute_transcription_baselines
from moebench.tasks.task import TASKS, Batch, TaskFacts, average_by_domain

BLANK = 0
"""Index of the blank class of CTC; symbol s of the data is class s + 1."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="cer",
        lower_is_better=True,
        data="telephone prompts in 5 languages, one voice each, 2,462 recordings, 72 minutes",
    )
)
class Speech(AudioTask):
    """Transcribe recordings by CTC over characters (Graves et al. 2006); the metric is the character error rate.

    Splits are by prompt, across languages. Each language of the embedded data has one speaker, so a difference between
    `cer/en` and `cer/ru` is also one between speakers.
    """

    target = "transcript"

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Options of the speech task."""

        name: str = "speech"

    @override
    @property
    def num_classes(self) -> int:
        return 1 + len(self.audio.symbols)

    @override
    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        size_B1 = (symbol_BS > 0).sum(1, keepdim=True)
        # CTC needs a position for each character, and a blank between equal neighbours.
        repeated_B1 = ((symbol_BS[:, 1:] == symbol_BS[:, :-1]) & (symbol_BS[:, 1:] > 0)).sum(1, keepdim=True)
        fits_B1 = length_B[:, None] >= size_B1 + repeated_B1
        return symbol_BS, size_B1, size_B1.where(fits_B1, 0)

    @override
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        assert batch.valid_BL is not None
        # On the CPU, because the gradient of CTC is not deterministic on a GPU.
        logp_LBV = functional.log_softmax(output.float(), dim=-1).transpose(0, 1).cpu()
        target_BS = batch.target_BP.cpu()
        loss_B = functional.ctc_loss(
            logp_LBV,
            target_BS,
            batch.valid_BL.sum(1).cpu(),
            (target_BS > 0).sum(1),
            blank=BLANK,
            reduction="none",
            zero_infinity=True,  # transcripts that are too long for the recording
        )
        return loss_B.unsqueeze(1).to(output.device)

    @override
    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        answers, texts = self.transcribe(output, batch), [self._text(row) for row in batch.target_BP.tolist()]
        counts = {
            "character_errors": count_character_errors(answers, texts),
            "characters": [len(text) for text in texts],
            "word_errors": count_word_errors(answers, texts),
            "words": [len(text.split()) for text in texts],
        }
        sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in counts.items()}
        return {**super().compute_sums(output, batch), **{name: x.to(output.device) for name, x in sums.items()}}

    def transcribe(self, output: Tensor, batch: Batch) -> list[str]:
        """Return the transcript of each utterance by the most probable class at each position."""
        assert batch.valid_BL is not None
        best_BL = output.argmax(-1).where(batch.valid_BL, BLANK)
        return [" ".join(self._text(collapse_path(row, BLANK)).split()) for row in best_BL.tolist()]

    def _text(self, classes: Sequence[int]) -> str:
        return "".join(self.audio.symbols[c - 1] for c in classes if c != BLANK)

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            **average_by_domain("cer", sums["character_errors"], sums["characters"], self.domains, self.num_held_out),
            **average_by_domain("wer", sums["word_errors"], sums["words"], self.domains, self.num_held_out),
            **average_by_domain("nats", sums["nats"], sums["weight"], self.domains, self.num_held_out),
        }

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return compute_transcription_baselines(self, split)
