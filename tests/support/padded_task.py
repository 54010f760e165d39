"""A task whose sequences differ in length, so that processes have different amounts of padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.language import TokenEmbedding, TokenHead
from moebench.tasks.task import ALL, TASKS, Batch, Task, TaskConfig, TaskFacts, average_by_domain


@TASKS.register(TaskFacts(causal=False, metric="nats", lower_is_better=True, data="random symbols, generated"))
class Padded(Task):
    """Predict how each symbol differs from the last one of its sequence; lengths from 0 to `sequence_length`."""

    vocab_size = 16
    domains = ("even", "odd")
    digest = eval_digest = "padded-1"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        """Options."""

        name: str = "padded"
        sequence_length: int = 12
        """Positions of a sequence, padding included."""

    def __init__(self, config: Config) -> None:
        self.sequence_length = config.sequence_length
        self.token_count_V = torch.ones(self.vocab_size, dtype=torch.int64)

    @classmethod
    def source_digest(cls, config: Config) -> str:
        return cls.digest

    @classmethod
    def prepare(cls, config: Config, cache: Path) -> "Padded":
        return cls(config)

    def _batch(self, size: int, *purpose: object) -> Batch:
        source, length = make_generator("padded", *purpose), self.sequence_length
        token_BL = torch.randint(self.vocab_size, (size, length), generator=source)
        length_B = torch.randint(length + 1, (size,), generator=source)
        length_B[0] = 0  # padding only
        valid_BL = torch.arange(length) < length_B[:, None]
        last_BL = token_BL.gather(1, (length_B - 1).clamp(min=0)[:, None])
        return Batch(
            input_BL=token_BL,
            target_BP=(token_BL - last_BL) % self.vocab_size,
            weight_BP=torch.ones_like(token_BL),
            domain_B=torch.arange(size) % 2,
            valid_BL=valid_BL,
            count_BP=valid_BL.long(),
        )

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        span = range(batch_size)[part]
        return self._batch(batch_size, seed, step).part(Span(start=span.start, length=len(span), total=batch_size))

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        return [self._batch(batch_size, split)]

    def build_embedding(self, d_model: int) -> nn.Module:
        return TokenEmbedding(self.vocab_size, d_model)

    def build_head(self, d_model: int) -> nn.Module:
        return TokenHead(d_model, self.vocab_size, bias=False)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        loss_T = functional.cross_entropy(output.flatten(0, 1), batch.target_BP.reshape(-1), reduction="none")
        return loss_T.view_as(batch.target_BP)

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return average_by_domain("nats", sums["nats"], sums["weight"], self.domains)
