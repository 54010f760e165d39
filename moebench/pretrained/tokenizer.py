"""The tokenizer of a folder: tokenizer.json alone, read by the library tokenizers."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.pretrained.byte_tokenizer import BYTES, format_byte_tokenizer
from moebench.pretrained.folder import PretrainedFolder
from moebench.tasks.text.embedded_tokenizer import BPE, BPE_FILE
from moebench.tasks.text.tokens import MAX_VOCAB, SubwordTokenizer

TOKENIZER = "tokenizer.json"
OTHER_FORMS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
MAX_BYTES = 256 * 2**20
NO_TEXT = "a"
"""Any text: the special tokens around it are those around every text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedTokenizer:
    """A tokenizer with the special tokens that the model expects around a text."""

    text: SubwordTokenizer
    """Encodes text without special tokens."""
    prefix: tuple[int, ...]
    """Ids before a text, such as the token that begins a sequence."""
    suffix: tuple[int, ...]
    """Ids after it."""
    sentinels: tuple[int, ...]
    """Ids that stand for removed spans (<extra_id_0> ...), in order; empty for most tokenizers."""

    tokens: tuple[str, ...]
    """Each id as the vocabulary writes it."""

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id; empty for special ids."""
        return self.text.pieces()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text (int64), without special ones."""
        return self.text.encode(text)[0]


def read_tokenizer(folder: PretrainedFolder) -> PretrainedTokenizer:
    """Return the tokenizer of a folder.

    Raises UsageError if it is missing, damaged, or has ids for which the model has no embedding.
    """
    from tokenizers import Tokenizer

    file = folder.path / TOKENIZER
    try:
        content = read_plain_file(file, MAX_BYTES)
        tokenizer = Tokenizer.from_str(content.decode())
    except FileNotFoundError as error:
        raise UsageError(_describe_missing(folder.path)) from error
    except Exception as error:  # the library raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{file}: cannot be read ({reason})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    limit = min(folder.vocab_size, MAX_VOCAB)
    if not 0 <= largest < limit:
        raise UsageError(
            f"{file}: its largest id is {largest}, and the model has vocab_size {folder.vocab_size}: the tokenizer is"
            " that of another model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix, suffix = _find_special(tokenizer, file)
    text = SubwordTokenizer(tokenizer, str(file), special_as_text=True, key=str(folder.path))
    return PretrainedTokenizer(
        text=text,
        prefix=prefix,
        suffix=suffix,
        sentinels=_find_sentinels(tokenizer),
        tokens=tuple(tokenizer.id_to_token(token) or "" for token in range(largest + 1)),
    )


def name_tokenizer(folder: PretrainedFolder) -> str:
    """Return what `task.data.tokenizer` names the tokenizer of a folder: bpe4096, bytes, or the file itself."""
    file = folder.path / TOKENIZER
    content = read_plain_file(file, MAX_BYTES)
    if content == BPE_FILE.read_bytes():
        return BPE
    return BYTES if content == format_byte_tokenizer().encode() else str(file)


def _find_special(tokenizer: Any, file: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer puts before and after a text."""
    try:
        encoding = tokenizer.encode(NO_TEXT, add_special_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{file}: cannot encode {NO_TEXT!r} ({error})") from error
    is_text = [not special for special in encoding.special_tokens_mask]
    if not any(is_text):
        return (), ()
    first, end = is_text.index(True), len(is_text) - is_text[::-1].index(True)
    return tuple(encoding.ids[:first]), tuple(encoding.ids[end:])


def _find_sentinels(tokenizer: Any) -> tuple[int, ...]:
    sentinels: list[int] = []
    while (token := tokenizer.token_to_id(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(token)
    return tuple(sentinels)


def _describe_missing(folder: Path) -> str:
    other = next((name for name in OTHER_FORMS if (folder / name).exists()), None)
    advice = (
        f"; it has {other}, which AutoTokenizer.from_pretrained(...).save_pretrained(...) converts" if other else ""
    )
    return f"{folder}: has no {TOKENIZER}{advice}"
