"""Run a model over a text and keep, for every counted token, what it is and which experts took it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebench.analysis.pretrained.recorder import LayerDecisions, RouterDecisions, record_routers
from moebench.analysis.pretrained.windows import ProbeText, TokenBatch
from moebench.errors import UsageError
from moebench.pretrained.model import PretrainedModel
from moebench.routing.layer_name import LayerName

HEAD_ROWS = 256
"""Positions whose logits over the vocabulary are in memory at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerAssignments:
    """The decisions of one MoE layer on the N counted tokens of its stack, in the order of `CountedTokens`."""

    name: LayerName
    num_experts: int
    expert_NK: Tensor
    """int64, before capacity, as the tables of runs are."""
    is_kept_NK: Tensor
    """False where an assignment was dropped for capacity."""
    weight_NK: Tensor
    """fp32."""
    random_NK: Tensor
    """What the router would choose with its weights drawn again, on the same input."""
    entropy: float
    """Mean entropy of the softmax of the logits, in nats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedTokens:
    """The N counted tokens of a stack, sequence by sequence."""

    token_N: Tensor
    previous_N: Tensor
    """The token before, as the model reads it; -1 at the beginning."""
    next_N: Tensor
    """The token after; -1 at the end."""
    position_N: Tensor
    """Position in its sequence, from 0."""
    length_N: Tensor
    """Tokens of its sequence."""
    sequence_N: Tensor
    domain_N: Tensor

    def __len__(self) -> int:
        return len(self.token_N)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collection:
    """Everything that a probe of a model needs."""

    text: ProbeText
    layers: tuple[LayerAssignments, ...]
    nats: float
    """Mean loss of a predicted token."""
    nats_sum: float
    num_bytes: int
    """Bytes of the predicted tokens."""

    @property
    def bits_per_byte(self) -> float | None:
        """Quality of the model on the text; None where no predicted token has bytes."""
        return self.nats_sum / math.log(2) / self.num_bytes if self.num_bytes else None

    def select_tokens(self, half: str | None) -> CountedTokens:
        """Return the counted tokens of a stack."""
        return list_counted_tokens(self.text.half(half), self.text.domain_B)


def list_counted_tokens(batch: TokenBatch, domain_B: Tensor) -> CountedTokens:
    """Return the tokens that count in the tables, with what is around each."""
    token_BL, is_text_BL = batch.token_BL, batch.is_text_BL
    outside_BL = token_BL.masked_fill(~batch.is_valid_BL, -1)
    row_N, column_N = is_text_BL.nonzero(as_tuple=True)
    return CountedTokens(
        token_N=token_BL[is_text_BL],
        previous_N=functional.pad(outside_BL, (1, 0), value=-1)[:, :-1][is_text_BL],
        next_N=functional.pad(outside_BL, (0, 1), value=-1)[:, 1:][is_text_BL],
        position_N=column_N,
        length_N=batch.is_valid_BL.sum(1)[row_N],
        sequence_N=row_N,
        domain_N=domain_B[row_N],
    )


@torch.no_grad()
def collect(
    model: PretrainedModel,
    text: ProbeText,
    byte_count_V: Tensor,
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Collection:
    """Run a model over all sequences and return its assignments.

    `byte_count_V`: bytes of each id, for the quality in bits per byte. Raises UsageError when the loss is not finite.
    """
    num_sequences = len(text.domain_B)
    parts: dict[LayerName, list[LayerAssignments]] = {layer: [] for layer in model.routers}
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, num_sequences, batch_size):
        batch = text.main.slice(first, batch_size)
        decoder = text.decoder.slice(first, batch_size) if text.decoder is not None else None
        with record_routers(model.routers, with_random=True) as records:
            sums += _run(model, batch, decoder, byte_count_V)
        for layer, record in records.items():
            counted = decoder if layer.half == "decoder" and decoder is not None else batch
            parts[layer].append(_select_counted(layer, record, counted.is_text_BL))
        if on_progress is not None:
            on_progress(min(first + batch_size, num_sequences), num_sequences)
    nats, num_predicted, num_bytes = sums.tolist()
    if not math.isfinite(nats):
        raise UsageError("the model's loss is not finite on this text; --dtype float32 has the largest range")
    return Collection(
        text=text,
        layers=tuple(_join(layer_parts) for layer_parts in parts.values()),
        nats=nats / max(num_predicted, 1),
        nats_sum=nats,
        num_bytes=int(num_bytes),
    )


def _run(model: PretrainedModel, batch: TokenBatch, decoder: TokenBatch | None, byte_count_V: Tensor) -> Tensor:
    """Return the loss in nats of the tokens that are predicted and counted, their number, and their bytes."""
    inputs = {"input_ids": batch.token_BL, "attention_mask": batch.is_valid_BL.long(), "use_cache": False}
    if decoder is None:
        hidden_BLD = model.module.base_model(**inputs).last_hidden_state
        head = model.module.get_output_embeddings()
        return _sum_losses(lambda rows: head(hidden_BLD[:, :-1][rows]), batch, byte_count_V)
    inputs |= {"decoder_input_ids": decoder.token_BL, "decoder_attention_mask": decoder.is_valid_BL.long()}
    logits_BLV = model.module(**inputs).logits
    return _sum_losses(lambda rows: logits_BLV[:, :-1][rows], decoder, byte_count_V)


def _sum_losses(compute_logits: Callable[[Tensor], Tensor], batch: TokenBatch, byte_count_V: Tensor) -> Tensor:
    is_target_BL = batch.is_text_BL[:, 1:]
    target_N = batch.token_BL[:, 1:][is_target_BL]
    row_N, column_N = is_target_BL.nonzero(as_tuple=True)
    nats = 0.0
    for start in range(0, len(target_N), HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        is_part_BL = torch.zeros_like(is_target_BL)
        is_part_BL[row_N[part], column_N[part]] = True
        nats += float(functional.cross_entropy(compute_logits(is_part_BL).float(), target_N[part], reduction="sum"))
    return torch.tensor([nats, len(target_N), int(byte_count_V[target_N].sum())], dtype=torch.float64)


def _select_counted(layer: LayerName, record: LayerDecisions, is_text_BL: Tensor) -> LayerAssignments:
    """Return the decisions on counted tokens of the one call of a router in a batch."""
    [choice], [random] = record.choices, record.random
    is_counted_T = is_text_BL.flatten()
    return LayerAssignments(
        name=layer,
        num_experts=choice.logits_TE.shape[-1],
        expert_NK=choice.expert_TK[is_counted_T],
        is_kept_NK=choice.is_kept_TK[is_counted_T],
        weight_NK=choice.weight_TK[is_counted_T],
        random_NK=random.expert_TK[is_counted_T],
        entropy=_mean_entropy(choice, is_counted_T),
    )


def _mean_entropy(choice: RouterDecisions, is_counted_T: Tensor) -> float:
    log_TE = choice.logits_TE[is_counted_T].log_softmax(-1)
    return float(-(log_TE.exp() * log_TE).sum(-1).mean()) if len(log_TE) else 0.0


def _join(parts: list[LayerAssignments]) -> LayerAssignments:
    sizes = [len(part.expert_NK) for part in parts]
    return LayerAssignments(
        name=parts[0].name,
        num_experts=parts[0].num_experts,
        expert_NK=torch.cat([part.expert_NK for part in parts]),
        is_kept_NK=torch.cat([part.is_kept_NK for part in parts]),
        weight_NK=torch.cat([part.weight_NK for part in parts]),
        random_NK=torch.cat([part.random_NK for part in parts]),
        entropy=sum(part.entropy * size for part, size in zip(parts, sizes, strict=True)) / max(sum(sizes), 1),
    )
