"""Text from files and other people, made safe to print: a terminal shows control characters and does not obey them.

A label, a question, a file name or the message of an error may contain escape sequences, which recolour, hide or
overwrite lines, set the clipboard or ask the terminal to type. Everything that is printed passes this module, or the
console of `reporting.console`, which uses it.
"""

import json
import re
import sys
from typing import Any, TextIO

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, changes of the direction of writing, bytes of names that are not UTF-8."""


def make_printable(text: str) -> str:
    r"""Return the text with escapes such as \x1b in place of characters that a terminal would obey."""
    return _UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text)


def format_json(value: Any, indent: int | None = 1) -> str:
    """Return a value as JSON of one meaning for programs and terminals: unprintable characters are escaped."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    text = json.dumps(value, indent=indent, ensure_ascii=not encoding.startswith("utf"))
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # they occur in JSON strings only


def print_text(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print text on standard output or to a stream, made printable."""
    print(make_printable(text), file=file, end=end, flush=True)


def print_error(text: str) -> None:
    """Print an error on standard error, as one line."""
    print_text(" ".join(f"error: {text}".split("\n")), file=sys.stderr)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
