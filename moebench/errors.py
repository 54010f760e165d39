"""The error for a user's mistake: one line with the key or file, what was given, what is allowed."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UsageError(Exception):
    """A mistake in a command, a configuration, a file or a machine: printed as one line, exit code 2."""

    def __init__(self, message: str) -> None:
        """Line breaks, which a name from outside may have, become spaces."""
        super().__init__(" ".join(message.splitlines()))


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return the text " Did you mean 'x'?" for the closest allowed name, or an empty string if none is close."""
    close = get_close_matches(given, list(allowed), n=1, cutoff=0.55)
    return f" Did you mean '{close[0]}'?" if close else ""


def build_unknown_error(kind: str, given: str, allowed: Iterable[str]) -> UsageError:
    """Return the error for an unknown name, with the closest and all allowed ones."""
    names = sorted(allowed)
    return UsageError(
        f"{shorten(kind)}: '{shorten(given)}' is unknown.{suggest(given, names)} Allowed: {list_some(names)}"
    )


MAX_GIVEN_LENGTH = 300
"""Characters that a message repeats of what was given: a damaged file may have a key of any length."""


def shorten(given: str) -> str:
    """Return a given text for a message: of a very long one the start, and its length."""
    if len(given) <= MAX_GIVEN_LENGTH:
        return given
    return f"{given[:MAX_GIVEN_LENGTH]}... ({len(given):,} characters)"


MAX_NAMES = 200
"""Names in a message: a grid may have 20,000 arms."""


def list_some(names: Sequence[str]) -> str:
    """Return names with commas between them, in quotes where they contain one; of very many the first ones."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(f"'{name}'" if "," in name else name for name in names[:MAX_NAMES]) + more


def require(condition: bool, key: str, given: object, allowed: str) -> None:
    """Raise UsageError naming the key, what was given and what is allowed, unless the condition holds."""
    if not condition:
        raise UsageError(f"{shorten(key)} must be {allowed}, got {shorten(str(given))}")


MAX_TEXT_LENGTH = 1000
"""Characters of a label or a question: they stand in tables, figures, run names and file names."""


def require_text(text: str | None, key: str) -> None:
    """Raise UsageError for a label or a question with NUL characters or of an impossible length."""
    if text is None:
        return
    require("\0" not in text, key, "a NUL character", "text without NUL characters")
    given = f"{len(text)} characters"
    require(len(text) <= MAX_TEXT_LENGTH, key, given, f"text of at most {MAX_TEXT_LENGTH} characters")
