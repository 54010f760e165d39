"""The tokenizer `bytes` as a file of the library tokenizers, with the same ids."""

import json
from typing import Any

from moebench.tasks.text.embedded_tokenizer import SEPARATOR
from moebench.tasks.text.notation import BYTE_CHARACTERS

BYTES = "bytes"
"""Its name in `task.data.tokenizer`."""


def format_byte_tokenizer() -> str:
    """Return the content of tokenizer.json: a byte-level BPE without merges, in which the id of a byte is its value.

    The separator has the id 256. A text that has it written out gets this id too, where `bytes` gives its bytes.
    """
    vocabulary = {character: value for value, character in enumerate(BYTE_CHARACTERS)}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(vocabulary),
                "content": SEPARATOR,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=2)
