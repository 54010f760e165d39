"""The tokenizer of a run as the files that transformers reads."""

import json
from typing import Any

from moebench.errors import UsageError
from moebench.pretrained.byte_tokenizer import BYTES, format_byte_tokenizer
from moebench.tasks.text.embedded_tokenizer import BPE, BPE_FILE, SEPARATOR
from moebench.tasks.text.tokens import Tokenizer


def format_tokenizer(name: str, tokenizer: Tokenizer) -> bytes:
    """Return a tokenizer.json whose ids, without special tokens, are those of a run's tokenizer.

    `name`: what `task.data.tokenizer` names it. The id of the separator gets a token if it has none; special tokens
    around each text are left out, since no text of training had any.
    """
    if name == BPE:
        return BPE_FILE.read_bytes()
    if name == BYTES:
        return format_byte_tokenizer().encode()
    content: dict[str, Any] = json.loads(tokenizer.to_json())
    if (content.get("post_processor") or {}).get("type") != "ByteLevel":  # which changes no id
        content["post_processor"] = None
    if tokenizer.separator not in _list_ids(tokenizer):
        content["added_tokens"].append(_describe_separator(tokenizer.separator))
    text = json.dumps(content, ensure_ascii=False)
    _require_separator(text, tokenizer.separator, name)
    return text.encode()


def format_tokenizer_config(tokenizer_json: bytes, separator: int, max_length: int) -> str:
    """Return a tokenizer_config.json: the class that reads tokenizer.json alone, and the end of a document."""
    from tokenizers import Tokenizer as Trained

    end = Trained.from_str(tokenizer_json.decode()).id_to_token(separator)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return _to_json(values)


def format_generation_config(separator: int) -> str:
    """Return a generation_config.json: generation ends with a document."""
    return _to_json({"eos_token_id": separator, "pad_token_id": separator})


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _list_ids(tokenizer: Tokenizer) -> set[int]:
    from tokenizers import Tokenizer as Trained

    return set(Trained.from_str(tokenizer.to_json()).get_vocab(with_added_tokens=True).values())


def _describe_separator(separator: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": separator, "content": SEPARATOR, **flags, "special": True}


def _require_separator(text: str, separator: int, name: str) -> None:
    from tokenizers import Tokenizer as Trained

    token = Trained.from_str(text).id_to_token(separator)
    if token is None:
        raise UsageError(
            f"task.data.tokenizer: '{name}' has ids with gaps, so that the token that ends a document cannot be added"
            " to its file"
        )
