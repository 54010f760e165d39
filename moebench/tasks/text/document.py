"""One text of a source, with its domain, group and split."""

from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.tasks.folders import TRAIN


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with its domain and its group."""

    text: str
    domain: str
    group: str
    """Documents of one group are never divided between splits."""
    part: str = TRAIN
    """Split that the source assigns; train where it assigns none, and then divided further."""


def check_text(text: str, location: str) -> str:
    """Return the text; raise UsageError for signs of binary data: lone surrogates and NUL bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"task.data.path: the text of {location} contains a lone surrogate (half a character)"
        ) from error
    if "\0" in text:
        raise UsageError(f"task.data.path: the text of {location} has NUL bytes: is it UTF-16, or not text? Convert it")
    return text
