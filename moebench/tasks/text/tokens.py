"""Tokenizers that also return the UTF-8 bytes of each token, because quality is measured per byte."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moebench.errors import UsageError, nearest
from moebench.tasks.sources import first_line
from moebench.tasks.text.coverage import EXAMPLE_LENGTH
from moebench.tasks.text.embedded_tokenizer import BPE, BPE_FILE

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""Usual names of the token that ends a document."""

MAX_VOCAB_SIZE = 1 << 24
"""Every id has a row of the embedding, whether it is used or not."""


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, including the separator."""

    @property
    def separator(self) -> int:
        """Id of the token between documents."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return token_N and byte_count_N (int64); the counts add up to the UTF-8 bytes of the text."""

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of tokens, without unknown ones."""

    def pieces(self) -> list[bytes]:
        """Return the bytes of each id, with a leading space where it begins a word; empty for special ids."""


class ByteTokenizer:
    """One token per UTF-8 byte: 256 ids and the separator."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of the text, and 1 for each."""
        token_N = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        return token_N, np.ones_like(token_N)

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of the bytes."""
        return token_N.astype(np.uint8).tobytes().decode()

    def pieces(self) -> list[bytes]:
        """Return each byte, and the empty string for the separator."""
        return [bytes([value]) for value in range(256)] + [b""]


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, which error messages call `name`.

    If it has no token for the end of a document, one id is added.
    """

    def __init__(self, tokenizer: Any, name: str = "tokenizer.json") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1  # ids may have gaps
        if size > MAX_VOCAB_SIZE:
            raise UsageError(f"task.data.tokenizer: '{name}' has ids up to {size - 1}, allowed: below {MAX_VOCAB_SIZE}")
        self.separator: int = next((ids[name] for name in SEPARATORS if name in ids), size)
        self.vocab_size: int = max(size, self.separator + 1)
        self._tokenizer = tokenizer
        self._name = name
        self._parts: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self._parts["model"]  # Unigram has the number of the token for what is unknown, others its name
        self._unknown: int | None = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and the bytes that they cover; uncovered bytes (stripped spaces) count for the next token.

        For a text without tokens (only stripped spaces) the arrays are empty. Raises UsageError for characters that the
        tokenizer cannot encode.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UsageError(
                f"task.data.tokenizer: '{self._name}' cannot encode {text[:EXAMPLE_LENGTH]!r} ({first_line(error)});"
                " give one that falls back to bytes, or 'bytes'"
            ) from error
        token_N = np.array(encoding.ids, dtype=np.int64)
        if not len(token_N):
            return token_N, token_N.copy()
        ends_N = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        # Tokens of one character (bytes of an emoji) share its offsets: the first one counts them all.
        covered_N = np.maximum.accumulate(ends_N)
        covered_N[-1] = len(text)
        byte_at = _byte_positions(text)
        return token_N, np.diff(byte_at[covered_N], prepend=0)

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of tokens: by the decoder of the tokenizer, or else as the concatenation of their pieces."""
        known = [token for token in token_N.tolist() if token != self._unknown]
        if self._parts["decoder"] is None:
            return b"".join(self._pieces[token] for token in known).decode(errors="replace")
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.pieces()

    def pieces(self) -> list[bytes]:
        """Return the bytes of each id from the notation of byte-level, SentencePiece or WordPiece vocabularies."""
        trained, parts = self._tokenizer, self._parts
        is_byte_level = '"ByteLevel"' in json.dumps([parts["decoder"], parts["pre_tokenizer"]])
        # In these, a piece without a mark begins a word, and the white space before it is dropped.
        drops_spaces = parts["model"]["type"] in ("WordPiece", "WordLevel")
        special = {index for index, token in trained.get_added_tokens_decoder().items() if token.special}
        special |= {self.separator, self._unknown}
        pieces = [b""] * self.vocab_size
        for piece, index in trained.get_vocab(with_added_tokens=True).items():
            if index not in special:
                pieces[index] = (
                    _read_byte_level(piece) if is_byte_level else _read_marks(piece, drops_spaces=drops_spaces)
                )
        return pieces


_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [value for value in range(256) if value not in _KEPT]
_BYTE_OF = {chr(value): value for value in _KEPT} | {chr(256 + n): value for n, value in enumerate(_MOVED)}
"""Character that byte-level vocabularies write -> byte: printable bytes as themselves, others from 256 upwards."""


def _read_byte_level(piece: str) -> bytes:
    known = all(character in _BYTE_OF for character in piece)
    return bytes(_BYTE_OF[character] for character in piece) if known else piece.encode()


def _read_marks(piece: str, *, drops_spaces: bool) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's notation of a byte
        return bytes([int(piece[3:5], 16)])
    if drops_spaces:
        return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
    return piece.replace("▁", " ").encode()


def tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json that a name refers to; None for 'bytes' and for a name on the hub."""
    if name == "bytes":
        return None
    if name == BPE:
        return BPE_FILE
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"task.data.tokenizer: the folder '{name}' has no tokenizer.json")
    if path.is_file():
        return path
    if path.suffix == ".json" or path.is_absolute():
        raise UsageError(
            f"task.data.tokenizer: '{name}' does not exist; allowed: '{BPE}', 'bytes', a tokenizer.json, a hub name"
        )
    return None


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `task.data.tokenizer` names; raise UsageError if it cannot be read."""
    if name == "bytes":
        return ByteTokenizer()
    from tokenizers import Tokenizer as Trained

    path = tokenizer_file(name)
    try:
        trained = Trained.from_file(str(path)) if path else Trained.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"task.data.tokenizer: '{name}' cannot be read ({reason}).{nearest(name, (BPE, 'bytes'))} Allowed: "
            f"'{BPE}', 'bytes', a tokenizer.json or its folder, a hub name"
        ) from error
    return SubwordTokenizer(trained, name)


def _byte_positions(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes before each character position 0 ... len(text)."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width_N = 1 + (code_N > 0x7F).astype(np.int64) + (code_N > 0x7FF) + (code_N > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width_N)])
