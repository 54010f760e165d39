"""Tokenizers that also return the UTF-8 bytes of each token, because quality is measured per byte."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moebench.errors import UsageError, suggest
from moebench.tasks.sources import first_line
from moebench.tasks.text.coverage import EXAMPLE_LENGTH
from moebench.tasks.text.embedded_tokenizer import BPE, BPE_FILE
from moebench.tasks.text.notation import is_byte_exact, read_byte_level, read_marks

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""Usual names of the token that ends a document."""
MAX_VOCAB = 1 << 22
"""Largest id of a tokenizer: tables of the model and of the counts have a row for each."""


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

    def encode_texts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the tokens of each text and their byte counts, None where `byte_count_V` has them."""

    @property
    def byte_count_V(self) -> np.ndarray | None:
        """Bytes of each id, where these always add up to the bytes of the text; None where they may not."""

    def to_json(self) -> str:
        """Return the content of a tokenizer.json; empty for bytes."""

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of tokens, without unknown ones."""

    def decode_bytes(self, token_N: np.ndarray) -> bytes:
        """Return the bytes of tokens, which may begin and end inside a character."""

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

    @property
    def byte_count_V(self) -> np.ndarray:
        """One byte for each id but the separator."""
        return np.array([1] * 256 + [0], dtype=np.uint8)

    def encode_texts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the bytes of each text."""
        return [(np.frombuffer(text.encode(), dtype=np.uint8), None) for text in texts]

    def to_json(self) -> str:
        """Return the empty text."""
        return ""

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of the bytes."""
        return token_N.astype(np.uint8).tobytes().decode()

    def decode_bytes(self, token_N: np.ndarray) -> bytes:
        """Return the bytes without the separators."""
        return token_N[token_N < 256].astype(np.uint8).tobytes()

    def pieces(self) -> list[bytes]:
        """Return each byte, and the empty string for the separator."""
        return [bytes([value]) for value in range(256)] + [b""]


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, which error messages call `name`.

    If it has no token for the end of a document, one id is added. `special_as_text`: a separator that is written in a
    text is text, not a separator. `key` begins the errors. Raises UsageError for one without tokens, and for ids that
    no table can have a row for.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str = "tokenizer.json",
        *,
        special_as_text: bool = False,
        key: str = "task.data.tokenizer",
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = special_as_text
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1  # ids may have gaps
        if not 1 <= size <= MAX_VOCAB:
            given = f"has the id {size - 1}" if size else "has no tokens"
            raise UsageError(f"{key}: '{name}' {given}; allowed: ids from 0 to {MAX_VOCAB - 1}")
        self.separator: int = next((ids[name] for name in SEPARATORS if name in ids), size)
        self.vocab_size: int = max(size, self.separator + 1)
        self._tokenizer = tokenizer
        self._name, self._key = name, key
        self._parts: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self._parts["model"]
        if model.get("dropout"):  # for training: tokens would be drawn at random
            tokenizer.model.dropout = model["dropout"] = None
        # Unigram has the number of the token for what is unknown, others its name
        self._unknown: int | None = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and the bytes that they cover; uncovered bytes (stripped spaces) count for the next token.

        For a text without tokens (only stripped spaces) the arrays are empty. Raises UsageError for characters that the
        tokenizer cannot encode.
        """
        with self._convert_encoding_errors(text):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return self._read_encoding(encoding, text)

    def encode_texts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Encode all texts at once, in the calling thread if TOKENIZERS_PARALLELISM is false."""
        is_exact = self.byte_count_V is not None
        encode = self._tokenizer.encode_batch_fast if is_exact else self._tokenizer.encode_batch
        with self._convert_encoding_errors(next(iter(texts), "")):
            encodings = encode(texts, add_special_tokens=False)
        if is_exact:
            return [(np.array(encoding.ids, dtype=np.uint32), None) for encoding in encodings]
        return [self._read_encoding(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]

    @contextmanager
    def _convert_encoding_errors(self, text: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            raise UsageError(
                f"{self._key}: '{self._name}' cannot encode {text[:EXAMPLE_LENGTH]!r} ({first_line(error)});"
                " give one that falls back to bytes, or 'bytes'"
            ) from error

    @staticmethod
    def _read_encoding(encoding: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
        token_N = np.array(encoding.ids, dtype=np.int64)
        if not len(token_N):
            return token_N, token_N.copy()
        ends_N = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        # Tokens of one character (bytes of an emoji) share its offsets: the first one counts them all.
        covered_N = np.maximum.accumulate(ends_N)
        covered_N[-1] = len(text)
        byte_at = _byte_positions(text)
        return token_N, np.diff(byte_at[covered_N], prepend=0)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return str(self._tokenizer.to_str())

    def decode(self, token_N: np.ndarray) -> str:
        """Return the text of tokens: by the decoder of the tokenizer, or else as the concatenation of their pieces."""
        known = [token for token in token_N.tolist() if token != self._unknown]
        if self._parts["decoder"] is None:
            return b"".join(self._pieces[token] for token in known).decode(errors="replace")
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    def decode_bytes(self, token_N: np.ndarray) -> bytes:
        """Return the pieces of the tokens, joined where each stands for its own bytes, else their decoded text."""
        if self.byte_count_V is not None:
            return b"".join([self._pieces[token] for token in token_N.tolist()])
        return self.decode(token_N[token_N != self.separator]).encode()

    @cached_property
    def byte_count_V(self) -> np.ndarray | None:
        """The length of each piece, for a byte-level BPE that changes no text."""
        special = {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        is_text = self.separator not in special and self.separator < self._tokenizer.get_vocab_size()
        if is_text or not is_byte_exact(self._parts, self._tokenizer.get_vocab(with_added_tokens=False)):
            return None
        return np.array([len(piece) for piece in self._pieces], dtype=np.uint32)

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
        added = {index: token.content for index, token in trained.get_added_tokens_decoder().items()}
        pieces = [b""] * self.vocab_size
        for piece, index in trained.get_vocab(with_added_tokens=True).items():
            if index in special:
                continue
            if index in added:  # as it is in the text, not in the notation of the vocabulary
                pieces[index] = added[index].encode()
            else:
                pieces[index] = (
                    read_byte_level(piece) if is_byte_level else read_marks(piece, drops_spaces=drops_spaces)
                )
        return pieces


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


def load_tokenizer(name: str, *, special_as_text: bool = False) -> Tokenizer:
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
            f"task.data.tokenizer: '{name}' cannot be read ({reason}).{suggest(name, (BPE, 'bytes'))} Allowed: "
            f"'{BPE}', 'bytes', a tokenizer.json or its folder, a hub name; for `moebench prepare` also train:VOCAB"
        ) from error
    return SubwordTokenizer(trained, name, special_as_text=special_as_text)


def _byte_positions(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes before each character position 0 ... len(text)."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width_N = 1 + (code_N > 0x7F).astype(np.int64) + (code_N > 0x7FF) + (code_N > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width_N)])
