"""Output in any encoding: characters that a terminal or a file cannot hold are replaced, never an error."""

import codecs
import sys

FALLBACKS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": "x", "·": "-", "…": "~", "≠": "!", "≤": "<=", "≥": ">=", "±": "+-",
        "─": "-", "━": "-", "│": "|", "→": "->", "√": "sqrt ", "π": "pi", "σ": "s", "Σ": "sum ",
    }
)  # fmt: skip


def use_replacements() -> None:
    """Let standard output and standard error replace what their encoding lacks."""
    codecs.register_error("moebench", _replace)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's stream has none
        if reconfigure is not None:
            reconfigure(errors="moebench")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(FALLBACKS)
    return text.encode("ascii", "replace").decode("ascii"), error.end
