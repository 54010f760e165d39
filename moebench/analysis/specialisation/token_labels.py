"""The labels of probed tokens: those that evaluations count, and finer ones that only a probe has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.specialisation.ctc_alignment import align_transcript
from moebench.analysis.specialisation.information import Ints
from moebench.analysis.specialisation.routed_tokens import RoutedTokens
from moebench.analysis.specialisation.word_classes import CLASSES, classify_tokens
from moebench.tasks.audio.task import AudioTask
from moebench.tasks.language import TextTask
from moebench.tasks.speech import Speech
from moebench.tasks.task import Batch, LabelKind, Task
from moebench.tasks.vision import Vision

OUTSIDE = "outside the window"
"""Name of the neighbour of the first and the last token of a window."""
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelColumn:
    """The label of each probed token, of one kind."""

    name: str
    values: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    label_T: Ints


def build_label_columns(
    task: Task, batches: Sequence[Batch], stack: str, tokens: RoutedTokens, outputs: Sequence[Tensor]
) -> dict[str, LabelColumn]:
    """Return the columns of all kinds of labels for the tokens of a stack; kinds with one label are left out.

    `outputs`: of the trained model, from which characters are aligned with the frames of speech.
    """
    views = [batch.decoder_batch if stack == "decoder" else batch for batch in batches]
    with_class_token = isinstance(task, Vision) and task.config.pooling == "class_token"
    columns = [_read_kind(kind, views, with_class_token=with_class_token) for kind in task.label_kinds()]
    if isinstance(task, TextTask):
        columns += _build_text_columns(task, views, tokens)
    if isinstance(task, Vision | AudioTask):
        name = "brightness" if isinstance(task, Vision) else "loudness"
        columns.append(_build_quarters(name, views, with_class_token=with_class_token))
    if isinstance(task, Speech):
        columns.append(_build_characters(task, views, outputs))
    return {column.name: column for column in columns if len(np.unique(column.label_T)) > 1}


def select_valid(value_BL: Tensor, batch: Batch) -> Tensor:
    """Return the values of the positions of a batch that are not padding, sequence by sequence."""
    return value_BL.reshape(-1) if batch.valid_BL is None else value_BL[batch.valid_BL]


def read_token_ids(task: Task, batches: Sequence[Batch]) -> tuple[Ints, int] | None:
    """Return the ids of the tokens and the size of the vocabulary; None where the input is not made of tokens."""
    ids = [batch.token_id_BL for batch in batches]
    if task.vocab_size is None or any(id_BL is None for id_BL in ids):
        return None
    parts = [select_valid(id_BL, batch) for id_BL, batch in zip(ids, batches, strict=True) if id_BL is not None]
    return torch.cat(parts).numpy(), task.vocab_size


def _read_kind(kind: LabelKind, batches: Sequence[Batch], *, with_class_token: bool) -> LabelColumn:
    parts = []
    for batch in batches:
        shape = len(batch.domain_B), batch.input_BL.shape[1] + with_class_token
        parts.append(select_valid(kind.read(batch).expand(shape), batch))
    return LabelColumn(name=kind.name, values=kind.values, label_T=torch.cat(parts).numpy())


def _build_text_columns(task: TextTask, batches: Sequence[Batch], tokens: RoutedTokens) -> list[LabelColumn]:
    read = read_token_ids(task, batches)
    assert read is not None
    id_T, vocab_size = read
    same_T = tokens.sequence_T[1:] == tokens.sequence_T[:-1]
    before_T, after_T = np.full_like(id_T, vocab_size), np.full_like(id_T, vocab_size)
    before_T[1:][same_T], after_T[:-1][same_T] = id_T[:-1][same_T], id_T[1:][same_T]
    pieces = task.text.tokenizer.pieces()
    pieces += [b""] * (vocab_size - len(pieces))
    names = (*map(format_piece, pieces), OUTSIDE)
    class_T = classify_sequences(id_T, tokens.sequence_T, pieces)
    columns = {"token_id": id_T, "previous_id": before_T, "next_id": after_T}
    return [
        *(LabelColumn(name=name, values=names, label_T=label_T) for name, label_T in columns.items()),
        LabelColumn(name="word_class", values=CLASSES, label_T=class_T),
    ]


def format_piece(piece: bytes) -> str:
    """Return the bytes of a token as text: white space is visible, bytes of a cut character are hexadecimal."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return piece.hex(" ")
    return "".join(f"\\x{ord(c):02x}" if c < " " and c not in "\n\t\r" else VISIBLE.get(c, c) for c in text)


VISIBLE: Mapping[str, str] = {" ": "␣", "\n": "↵", "\t": "→", "\r": "␍"}


def classify_sequences(id_T: Ints, sequence_T: Ints, pieces: Sequence[bytes]) -> Ints:
    """Return the word class of each token; words do not go across the ends of sequences."""
    bounds = [0, *(np.flatnonzero(np.diff(sequence_T)) + 1).tolist(), len(id_T)]
    parts = [classify_tokens([pieces[token] for token in id_T[start:end]]) for start, end in pairwise(bounds)]
    return np.concatenate(parts)


def _build_quarters(name: str, batches: Sequence[Batch], *, with_class_token: bool) -> LabelColumn:
    """Return the quarter of all tokens that the mean input of each is in; a class token is in the lowest."""
    means = []
    for batch in batches:
        mean_BL = batch.input_BL.float().mean(-1)
        if with_class_token:
            mean_BL = torch.cat([mean_BL.new_full((len(mean_BL), 1), -torch.inf), mean_BL], 1)
        means.append(select_valid(mean_BL, batch))
    mean_T = torch.cat(means).numpy()
    finite_T = mean_T[np.isfinite(mean_T)]
    label_T = np.searchsorted(np.quantile(finite_T, [0.25, 0.5, 0.75]), mean_T, side="right")
    return LabelColumn(name=name, values=QUARTERS, label_T=label_T.astype(np.int64))


def _build_characters(task: Speech, batches: Sequence[Batch], outputs: Sequence[Tensor]) -> LabelColumn:
    """Return the character that the trained model's best alignment with the transcript has at each position."""
    parts = []
    for batch, output in zip(batches, outputs, strict=True):
        assert batch.valid_BL is not None
        length_B = batch.valid_BL.sum(1).tolist()
        logp_BLV = output.float().log_softmax(-1).cpu().numpy()
        for logp_LV, target_S, length in zip(logp_BLV, batch.target_BP.tolist(), length_B, strict=True):
            parts.append(align_transcript(logp_LV[:length], [symbol for symbol in target_S if symbol > 0]))
    names = ("blank", *("space" if symbol == " " else symbol for symbol in task.audio.symbols))
    return LabelColumn(name="character", values=names, label_T=np.concatenate(parts))
