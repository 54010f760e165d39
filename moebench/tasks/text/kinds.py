"""Kinds of tokens by a simple rule on their bytes: experts of text are known to specialise in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TOKEN_KINDS = ("word start", "inside word", "digit", "punctuation", "space", "special")
START, INSIDE, DIGIT, PUNCTUATION, SPACE, SPECIAL = range(6)
SPACES, DIGITS = b" \t\n\r\v\f", b"0123456789"
LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") | frozenset(range(128, 256))
"""ASCII letters and all bytes above 127, most of which are parts of letters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenKinds:
    """The kinds of the V ids of a vocabulary.

    The first byte that is not white space determines the kind: a letter, a digit, or else punctuation. A token of white
    space only is a space, one without bytes (separators, masks, sentinels) special. A letter begins a word if it
    follows white space in the token, or if the previous token does not end in a letter.
    """

    alone_V: Tensor
    """Kind of each id (int64) without regard to the previous token, as if that ended in a letter."""
    open_V: Tensor
    """Whether the id ends in a letter (bool), so that a letter after it is inside a word."""

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> "TokenKinds":
        """Return the kinds of ids from the bytes of each."""
        return cls(
            alone_V=torch.tensor([_kind_alone(piece) for piece in pieces]),
            open_V=torch.tensor([piece[-1:] != b"" and piece[-1] in LETTERS for piece in pieces]),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "TokenKinds":
        """Return the kinds from the result of `arrays`."""
        alone_V, open_V = (torch.from_numpy(np.array(arrays[name])) for name in ("alone", "open"))
        return cls(alone_V=alone_V.long(), open_V=open_V)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the kinds as arrays for the cache."""
        return {"alone": self.alone_V.numpy().astype(np.uint8), "open": self.open_V.numpy()}

    def pad_vocab(self, vocab_size: int) -> "TokenKinds":
        """Return the kinds of a larger vocabulary, whose additional ids are special."""
        num_added = vocab_size - len(self.alone_V)
        return TokenKinds(
            alone_V=functional.pad(self.alone_V, (0, num_added), value=SPECIAL),
            open_V=functional.pad(self.open_V, (0, num_added), value=False),
        )

    def label(self, token_BL: Tensor, text_BL: Tensor) -> Tensor:
        """Return the kind of each token; `text_BL` has the tokens of the text, for the one before each.

        The text before a sequence is unknown: a letter at its beginning counts as the start of a word.
        """
        kind_BL = self.alone_V.to(token_BL.device)[token_BL]
        open_BL = functional.pad(self.open_V.to(text_BL.device)[text_BL], (1, 0))[:, :-1]
        return kind_BL.masked_fill((kind_BL == INSIDE) & ~open_BL, START)


def _kind_alone(piece: bytes) -> int:
    stripped = piece.lstrip(SPACES)
    if not stripped:
        return SPACE if piece else SPECIAL
    if stripped[0] in LETTERS:
        return START if len(stripped) < len(piece) else INSIDE
    return DIGIT if stripped[0] in DIGITS else PUNCTUATION
