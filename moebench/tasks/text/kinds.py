"""What kind of token each is, by a simple rule on its bytes: what experts of text are known to sort by."""

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
"""ASCII letters, and all bytes beyond ASCII: most of these are parts of letters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenKinds:
    """The kinds of the V ids of a vocabulary.

    The first byte that is no white space decides: a letter, a digit, or else punctuation; a token of white space alone
    is a space, one without bytes (separators, masks, sentinels) special. A letter begins a word where white space comes
    before it in the token, or the token before ends in no letter.
    """

    alone_V: Tensor
    """int64: the kind of each id, as far as it does not depend on the token before: letters are inside a word."""
    open_V: Tensor
    """bool: the id ends in a letter, so a letter behind it is inside a word."""

    @classmethod
    def of_pieces(cls, pieces: Sequence[bytes]) -> "TokenKinds":
        """Judge the bytes of each id."""
        return cls(
            alone_V=torch.tensor([_alone(piece) for piece in pieces]),
            open_V=torch.tensor([piece[-1:] != b"" and piece[-1] in LETTERS for piece in pieces]),
        )

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "TokenKinds":
        """Take what `arrays` has returned."""
        alone_V, open_V = (torch.from_numpy(np.array(arrays[name])) for name in ("alone", "open"))
        return cls(alone_V=alone_V.long(), open_V=open_V)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the kinds as they are stored."""
        return {"alone": self.alone_V.numpy().astype(np.uint8), "open": self.open_V.numpy()}

    def extended(self, vocab_size: int) -> "TokenKinds":
        """Return the kinds with special ids behind, up to `vocab_size`."""
        more = vocab_size - len(self.alone_V)
        return TokenKinds(
            alone_V=functional.pad(self.alone_V, (0, more), value=SPECIAL),
            open_V=functional.pad(self.open_V, (0, more), value=False),
        )

    def label(self, token_BL: Tensor, text_BL: Tensor) -> Tensor:
        """Return the kind of each token; `text_BL`: the tokens that say what stands before each.

        What stands before a sequence is not known: a letter that begins one counts as a word's start.
        """
        kind_BL = self.alone_V.to(token_BL.device)[token_BL]
        open_BL = functional.pad(self.open_V.to(text_BL.device)[text_BL], (1, 0))[:, :-1]
        return kind_BL.masked_fill((kind_BL == INSIDE) & ~open_BL, START)


def _alone(piece: bytes) -> int:
    seen = piece.lstrip(SPACES)
    if not seen:
        return SPACE if piece else SPECIAL
    if seen[0] in LETTERS:
        return START if len(seen) < len(piece) else INSIDE
    return DIGIT if seen[0] in DIGITS else PUNCTUATION
