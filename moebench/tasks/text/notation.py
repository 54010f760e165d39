"""How vocabularies write bytes and spaces, and whether the pieces of a tokenizer are the bytes of the text."""

import re
from collections.abc import Collection, Mapping
from typing import Any

_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [value for value in range(256) if value not in _KEPT]
_BYTE_OF = {chr(value): value for value in _KEPT} | {chr(256 + n): value for n, value in enumerate(_MOVED)}
"""Character that byte-level vocabularies write -> byte: printable bytes as themselves, others from 256 upwards."""


BYTE_CHARACTERS = tuple(sorted(_BYTE_OF, key=_BYTE_OF.__getitem__))
"""The character of each byte."""


def read_byte_level(piece: str) -> bytes:
    """Return the bytes of a piece of a byte-level vocabulary."""
    known = all(character in _BYTE_OF for character in piece)
    return bytes(_BYTE_OF[character] for character in piece) if known else piece.encode()


def read_marks(piece: str, *, drops_spaces: bool) -> bytes:
    """Return the bytes of a piece of SentencePiece, or of WordPiece and word vocabularies, which drop spaces."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's notation of a byte
        return bytes([int(piece[3:5], 16)])
    if drops_spaces:
        return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
    return piece.replace("▁", " ").encode()


def is_byte_exact(parts: Mapping[str, Any], vocabulary: Collection[str]) -> bool:
    """Return whether the tokens of every text, each read by `read_byte_level`, are the text itself.

    `parts`: the content of tokenizer.json. That is so for a byte-level BPE that has all bytes and neither normalizes
    or drops anything, as those of GPT-2 and Llama 3 do.
    """
    model, added = parts["model"], parts.get("added_tokens") or []
    return (
        model["type"] == "BPE"
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"))
        and parts.get("normalizer") is None
        and _keeps_all_bytes(parts.get("pre_tokenizer"))
        and not any(token["lstrip"] or token["rstrip"] for token in added if not token["special"])
        and all(character in vocabulary for character in _BYTE_OF)
    )


def _keeps_all_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    splits = ("Split", "Digits", "Punctuation")
    return (
        [step["type"] for step in steps].count("ByteLevel") == 1
        and steps[-1]["type"] == "ByteLevel"
        and not steps[-1]["add_prefix_space"]
        and all(step["type"] in splits and step.get("behavior") != "Removed" for step in steps[:-1])
    )
