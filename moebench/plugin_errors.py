"""Errors in plug-in files: one line that says where in the file, instead of a traceback."""

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator

from moebench.errors import UsageError

PLUGIN_MODULE = "moebench_plugin_"
"""How the names of modules begin that were loaded from plug-in files."""


KEPT = "_moebench_keeps_traceback"
"""Attribute of exceptions whose traceback the user has asked for."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class ContractError(UsageError):
    """A component breaks its contract or does not do what its file declares; the message names the file."""


def is_plugin(item: object) -> bool:
    """Return whether a class or a function is defined outside moebench."""
    return not getattr(item, "__module__", "").startswith("moebench.")


def find_plugin_line(error: BaseException) -> tuple[str, int] | None:
    """Return the file and the line of the innermost plug-in frame that an exception passed; None: there is none."""
    location = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if PLUGIN_MODULE in frame.f_globals.get("__name__", ""):
            location = frame.f_code.co_filename, line
    return location


def describe_error(error: BaseException) -> str:
    """Return an exception in one line, with the line of the plugin file that it comes from."""
    location = find_plugin_line(error)
    line = error.lineno if isinstance(error, SyntaxError) else location and location[1]
    text = error.msg if isinstance(error, SyntaxError) else str(error)  # that of a SyntaxError repeats file and line
    return _format_error(error, text) + (f" (line {line})" if line else "")


def describe_plugin_error(error: BaseException) -> str:
    """Return an exception as one line that begins with file and line; empty: it does not come from a plug-in."""
    location = None if hasattr(error, KEPT) else find_plugin_line(error)
    return f"{location[0]}:{location[1]}: {_format_error(error, str(error))}" if location else ""


def _format_error(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}{': ' if text else ''}{' '.join(text.split())}"


def keep_traceback(error: BaseException) -> None:
    """Mark an exception to be shown with its traceback, for a debugger."""
    vars(error)[KEPT] = True


@contextlib.contextmanager
def convert_plugin_errors() -> Iterator[None]:
    """Convert exceptions that come from a plug-in to UsageError with file and line.

    SystemExit too, here and in `convert_errors`: `sys.exit()` in a plug-in must not end the command.
    """
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        text = describe_plugin_error(error)
        if not text:
            raise
        raise UsageError(text) from error


@contextlib.contextmanager
def convert_errors(label: Callable[[], str]) -> Iterator[None]:
    """Convert exceptions to ContractError, whose message begins with `label`; not a lack of memory or disk space."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        raise ContractError(f"{label()}: {describe_error(error)}") from error
