"""Speech: what is said in a recording, as a transcript (CTC) or as one of a set of classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moebench.tasks.audio.clips import AudioDataConfig
from moebench.tasks.audio.task import AudioConfig, AudioTask
from moebench.tasks.audio.transcripts import character_errors, collapsed, word_errors
from moebench.tasks.task import TASKS, Batch, LabelKind, TaskFacts, average_by_domain

BLANK = 0
"""The class of CTC that says nothing; symbol s of the data is class s + 1."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="cer",
        lower_is_better=True,
        data="telephone prompts in 5 languages, one voice each, 2,462 recordings of 72 minutes",
    )
)
class Speech(AudioTask):
    """Transcribe recordings by CTC over characters (Graves et al. 2006); quality is the character error rate.

    Splits are by prompt, across languages. A language of the embedded data is also one voice: a difference between
    `cer/en` and `cer/ru` is one of speakers too.
    """

    target = "transcript"

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Options of the speech task."""

        name: str = "speech"

    @property
    def num_classes(self) -> int:
        """Blank and characters."""
        return 1 + len(self.audio.symbols)

    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        size_B1 = (symbol_BS > 0).sum(1, keepdim=True)
        # CTC needs a position for each character, and a blank between two that are alike.
        repeated_B1 = ((symbol_BS[:, 1:] == symbol_BS[:, :-1]) & (symbol_BS[:, 1:] > 0)).sum(1, keepdim=True)
        fits_B1 = length_B[:, None] >= size_B1 + repeated_B1
        return symbol_BS, size_B1, size_B1.where(fits_B1, 0)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the negative log likelihood of each transcript in nats, in fp32; 0 where it is too long for CTC."""
        assert batch.valid_BL is not None
        # On a GPU the gradient of CTC would add up in any order; the CPU gives the same numbers each time.
        logp_LBV = functional.log_softmax(output.float(), dim=-1).transpose(0, 1).cpu()
        target_BS = batch.target_BP.cpu()
        loss_B = functional.ctc_loss(
            logp_LBV,
            target_BS,
            batch.valid_BL.sum(1).cpu(),
            (target_BS > 0).sum(1),
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        return loss_B.unsqueeze(1).to(output.device)

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return errors and sizes in characters and words, by the best class of each position."""
        answers, texts = self.answers(output, batch), [self._text(row) for row in batch.target_BP.tolist()]
        found = {
            "character_errors": character_errors(answers, texts),
            "characters": [len(text) for text in texts],
            "word_errors": word_errors(answers, texts),
            "words": [len(text.split()) for text in texts],
        }
        counts = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
        return {
            **super().compute_sums(output, batch),
            **{name: value.to(output.device) for name, value in counts.items()},
        }

    def answers(self, output: Tensor, batch: Batch) -> list[str]:
        """Return what the model says of each utterance."""
        assert batch.valid_BL is not None
        best_BL = output.argmax(-1).where(batch.valid_BL, BLANK)
        return [" ".join(self._text(collapsed(row, BLANK)).split()) for row in best_BL.tolist()]

    def _text(self, classes: Sequence[int]) -> str:
        return "".join(self.audio.symbols[c - 1] for c in classes if c != BLANK)

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return character and word error rate over all recordings and by language, and nats per character."""
        return {
            **average_by_domain("cer", sums["character_errors"], sums["characters"], self.domains, self.num_held_out),
            **average_by_domain("wer", sums["word_errors"], sums["words"], self.domains, self.num_held_out),
            **average_by_domain("nats", sums["nats"], sums["weight"], self.domains, self.num_held_out),
        }


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="accuracy",
        lower_is_better=False,
        data="none of its own: give labelled recordings with task.data.path or task.data.dataset",
    )
)
class Keyword(AudioTask):
    """Say which of a set of classes a recording is: the mean of the head over its positions, cross-entropy."""

    target = "label"

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Options of the keyword task."""

        name: str = "keyword"
        data: AudioDataConfig = field(default_factory=lambda: AudioDataConfig(target_column="label"))
        """Where the recordings come from: a table with a column of classes, or a folder with a folder per class."""

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.audio.symbols)

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Add the class of the recording."""
        own = LabelKind(name="class", values=self.audio.symbols, read=lambda batch: batch.target_BP)
        return *super().label_kinds(), own

    def _targets(self, symbol_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return symbol_BS - 1, torch.ones_like(symbol_BS), None

    def _logits(self, output: Tensor, batch: Batch) -> Tensor:
        assert batch.valid_BL is not None
        valid_BL1 = batch.valid_BL.unsqueeze(-1)
        return output.float().where(valid_BL1, 0.0).sum(1) / valid_BL1.sum(1)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each recording in nats, in fp32."""
        loss_B = functional.cross_entropy(self._logits(output, batch), batch.target_BP[:, 0], reduction="none")
        return loss_B.unsqueeze(1)

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return which recordings are named right."""
        right_B = self._logits(output, batch).argmax(-1) == batch.target_BP[:, 0]
        return {**super().compute_sums(output, batch), "right": right_B}

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the share of recordings named right and nats per recording, over all and by domain."""
        return {
            **average_by_domain("accuracy", sums["right"], sums["weight"], self.domains, self.num_held_out),
            **average_by_domain("nats", sums["nats"], sums["weight"], self.domains, self.num_held_out),
        }
