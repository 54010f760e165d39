"""Text to tokens, with the number of UTF-8 bytes that each token stands for: quality is measured per byte."""

from typing import Any, Protocol

import numpy as np

from moebench.errors import UsageError
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


class ByteTokenizer:
    """Every UTF-8 byte is a token: 256 ids and one more for the separator."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of the text, each counting one."""
        token_N = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        return token_N, np.ones_like(token_N)


class SubwordTokenizer:
    """A trained tokenizer of the `tokenizers` library; one without an end token is given one more id."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1  # ids may have holes, so their number is not enough
        self.separator: int = next((ids[name] for name in SEPARATORS if name in ids), size)
        self.vocab_size: int = max(size, self.separator + 1)
        self._tokenizer = tokenizer

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and the bytes they cover; what none covers (stripped spaces) counts for the next one.

        A text of which nothing is left (only stripped spaces) has no token to count for it: empty arrays.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        token_N = np.array(encoding.ids, dtype=np.int64)
        if not len(token_N):
            return token_N, token_N.copy()
        ends_N = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        # Pieces of one character (bytes of an emoji) share its offsets: the first counts all, others none.
        covered_N = np.maximum.accumulate(ends_N)
        covered_N[-1] = len(text)
        byte_at = _byte_positions(text)
        return token_N, np.diff(byte_at[covered_N], prepend=0)


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
    return SubwordTokenizer(trained)


def _byte_positions(text: str) -> np.ndarray:
    """Return, for each character position 0 ... len(text), the number of UTF-8 bytes before it."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width_N = 1 + (code_N > 0x7F).astype(np.int64) + (code_N > 0x7FF) + (code_N > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width_N)])
