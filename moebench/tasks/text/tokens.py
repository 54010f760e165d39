"""Text to tokens, with the number of UTF-8 bytes that each token stands for: quality is measured per byte."""

import json
import re
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.sources import first_line
from moebench.tasks.text.coverage import SHOWN
from moebench.tasks.text.documents import tokenizer_file

# Names that tokenizers give to the token that ends a document.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What turns a text into tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the separator included."""

    @property
    def separator(self) -> int:
        """Token that stands between documents."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return token_N and byte_count_N (int64), whose sum is the number of UTF-8 bytes of the text."""

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text that tokens stand for, without what is unknown."""

    def pieces(self) -> list[bytes]:
        """Return the bytes that each id stands for, a space first where it begins a word; none for special ids."""


class ByteTokenizer:
    """Every UTF-8 byte is a token: 256 ids and one more for the separator."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of the text, each counting one."""
        token_N = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        return token_N, np.ones_like(token_N)

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text whose bytes these are."""
        return token_N.astype(np.uint8).tobytes().decode()

    def pieces(self) -> list[bytes]:
        """Return each byte, and nothing for the separator."""
        return [bytes([value]) for value in range(256)] + [b""]


class SubwordTokenizer:
    """A trained tokenizer of the `tokenizers` library; one without an end token is given one more id.

    `name` is what errors call it.
    """

    def __init__(self, tokenizer: Any, name: str = "tokenizer.json") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1  # ids may have holes, so their number is not enough
        self.separator: int = next((ids[name] for name in SEPARATORS if name in ids), size)
        self.vocab_size: int = max(size, self.separator + 1)
        self._tokenizer = tokenizer
        self._name = name
        self._parts: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self._parts["model"]  # Unigram has the number of the token for what is unknown, others its name
        self._unknown: int | None = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and the bytes they cover; what none covers (stripped spaces) counts for the next one.

        A text of which nothing is left (only stripped spaces) has no token to count for it: empty arrays. Raises
        `UsageError` for characters that it does not know, where it has no token for them.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UsageError(
                f"task.data.tokenizer: '{self._name}' cannot encode {text[:SHOWN]!r} ({first_line(error)}); give one"
                " that falls back to bytes, or 'bytes'"
            ) from error
        token_N = np.array(encoding.ids, dtype=np.int64)
        if not len(token_N):
            return token_N, token_N.copy()
        ends_N = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        # Pieces of one character (bytes of an emoji) share its offsets: the first counts all, others none.
        covered_N = np.maximum.accumulate(ends_N)
        covered_N[-1] = len(text)
        byte_at = _byte_positions(text)
        return token_N, np.diff(byte_at[covered_N], prepend=0)

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text that tokens stand for; without a decoder of its own, what their pieces make side by side."""
        known = [token for token in token_N.tolist() if token != self._unknown]
        if self._parts["decoder"] is None:
            return b"".join(self._pieces[token] for token in known).decode(errors="replace")
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.pieces()

    def pieces(self) -> list[bytes]:
        """Read the vocabulary as byte-level, SentencePiece and WordPiece tokenizers write it."""
        trained, parts = self._tokenizer, self._parts
        is_byte_level = '"ByteLevel"' in json.dumps([parts["decoder"], parts["pre_tokenizer"]])
        # Of these, a piece without a mark begins a word: the white space before it is gone.
        drops_spaces = parts["model"]["type"] in ("WordPiece", "WordLevel")
        special = {index for index, token in trained.get_added_tokens_decoder().items() if token.special}
        special |= {self.separator, self._unknown}
        found = [b""] * self.vocab_size
        for piece, index in trained.get_vocab(with_added_tokens=True).items():
            if index not in special:
                found[index] = _byte_level(piece) if is_byte_level else _marked(piece, drops_spaces=drops_spaces)
        return found


_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [value for value in range(256) if value not in _KEPT]
_BYTE_OF = {chr(value): value for value in _KEPT} | {chr(256 + n): value for n, value in enumerate(_MOVED)}
"""The characters that byte-level tokenizers write for bytes: printable ones for themselves, others from 256 on."""


def _byte_level(piece: str) -> bytes:
    known = all(character in _BYTE_OF for character in piece)
    return bytes(_BYTE_OF[character] for character in piece) if known else piece.encode()


def _marked(piece: str, *, drops_spaces: bool) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's way to write a byte
        return bytes([int(piece[3:5], 16)])
    if drops_spaces:
        return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
    return piece.replace("▁", " ").encode()


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `task.data.tokenizer` names; raise `UsageError` when it cannot be read."""
    if name == "bytes":
        return ByteTokenizer()
    from tokenizers import Tokenizer as Trained

    path = tokenizer_file(name)
    try:
        trained = Trained.from_file(str(path)) if path else Trained.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"task.data.tokenizer: '{name}' cannot be read ({reason}); allowed: 'bytes', a tokenizer.json or "
            "its folder, a hub name"
        ) from error
    return SubwordTokenizer(trained, name)


def _byte_positions(text: str) -> np.ndarray:
    """Return, for each character position 0 ... len(text), the number of UTF-8 bytes before it."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width_N = 1 + (code_N > 0x7F).astype(np.int64) + (code_N > 0x7FF) + (code_N > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width_N)])
