"""Labels of the counted tokens of a model of transformers: the kinds that a probe of a run on text has."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.pretrained.collect import CountedTokens
from moebench.analysis.specialisation.information import Ints
from moebench.analysis.specialisation.token_labels import OUTSIDE, LabelColumn, classify_sequences, format_piece
from moebench.analysis.specialisation.word_classes import CLASSES
from moebench.tasks.task import NUM_PARTS
from moebench.tasks.text.kinds import TOKEN_KINDS, TokenKinds

SENTINEL_VALUES = ("text", "sentinel")


class TokenNames:
    """The pieces of a vocabulary of V ids: their bytes, their names and their kinds."""

    def __init__(self, pieces: Sequence[bytes], special: Sequence[str], vocab_size: int) -> None:
        self.pieces = [*pieces, *[b""] * (vocab_size - len(pieces))]
        self._special = special

    @cached_property
    def kinds(self) -> TokenKinds:
        """The kind of each id."""
        return TokenKinds.from_pieces(self.pieces)

    def name(self, token: int) -> str:
        """Return the text of a token; of a special one its name in the vocabulary."""
        if not 0 <= token < len(self.pieces):
            return OUTSIDE
        return format_piece(self.pieces[token]) or (
            self._special[token] if token < len(self._special) else f"<{token}>"
        )


def build_columns(
    tokens: CountedTokens, domains: tuple[str, ...], names: TokenNames, sentinels: Sequence[int]
) -> dict[str, LabelColumn]:
    """Return the labels of the tokens of a stack by kind; kinds with a single label are left out."""
    parts = tuple(f"{part + 1}/{NUM_PARTS}" for part in range(NUM_PARTS))
    part_N = (tokens.position_N * NUM_PARTS // tokens.length_N).clamp(max=NUM_PARTS - 1)
    is_sentinel_N = torch.isin(tokens.token_N, torch.tensor(sentinels, dtype=torch.int64))
    class_N = classify_sequences(tokens.token_N.numpy(), tokens.sequence_N.numpy(), names.pieces)
    columns = [
        LabelColumn(name="domain", values=domains, label_T=_array(tokens.domain_N)),
        LabelColumn(name="position", values=parts, label_T=_array(part_N)),
        LabelColumn(name="token", values=TOKEN_KINDS, label_T=_array(_label_kinds(tokens, names.kinds))),
        _build_id_column("token_id", tokens.token_N, names),
        _build_id_column("previous_id", tokens.previous_N, names),
        _build_id_column("next_id", tokens.next_N, names),
        LabelColumn(name="word_class", values=CLASSES, label_T=class_N),
        LabelColumn(name="sentinel", values=SENTINEL_VALUES, label_T=_array(is_sentinel_N)),
    ]
    return {column.name: column for column in columns if len(np.unique(column.label_T)) > 1}


def compress_ids(token_N: Tensor) -> tuple[Ints, Ints]:
    """Return the ids that occur, ascending, and for each token its place among them: tables have no other rows."""
    occurring, index_N = np.unique(token_N.numpy(), return_inverse=True)
    return occurring, index_N.astype(np.int64)


def _build_id_column(kind: str, token_N: Tensor, names: TokenNames) -> LabelColumn:
    occurring, index_N = compress_ids(token_N)
    return LabelColumn(name=kind, values=tuple(names.name(token) for token in occurring.tolist()), label_T=index_N)


def _label_kinds(tokens: CountedTokens, kinds: TokenKinds) -> Tensor:
    """Return the kind of each token, given the token before it; that of a first one is unknown."""
    pair_N2 = torch.stack([tokens.previous_N, tokens.token_N], dim=1)
    is_first_N = tokens.previous_N < 0
    label_N2 = kinds.label(pair_N2.clamp(min=0), pair_N2.clamp(min=0))
    alone_N1 = kinds.label(tokens.token_N[:, None], tokens.token_N[:, None])
    return torch.where(is_first_N, alone_N1[:, 0], label_N2[:, 1])


def _array(label_N: Tensor) -> Ints:
    array: Ints = label_N.long().numpy()
    return array
