"""Errors in plug-in files: one line that says where in the file, instead of a traceback."""

import contextlib
import traceback
from collections.abc import Iterator

from moebench.errors import UsageError

PLUGIN_MODULE = "moebench_plugin_"
"""How the names of modules begin that were loaded from plug-in files."""


def find_plugin_line(error: BaseException) -> tuple[str, int] | None:
    """Return the file and the line of the innermost plug-in frame that an exception passed; None: there is none."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if PLUGIN_MODULE in frame.f_globals.get("__name__", ""):
            place = frame.f_code.co_filename, line
    return place


def describe_error(error: BaseException) -> str:
    """Return an exception in one line, with the line of the plugin file that it comes from."""
    place = find_plugin_line(error)
    line = error.lineno if isinstance(error, SyntaxError) else place and place[1]
    return f"{type(error).__name__}: {' '.join(str(error).split())}" + (f" (line {line})" if line else "")


@contextlib.contextmanager
def plugin_errors_in_one_line() -> Iterator[None]:
    """Raise UsageError, with file and line, in place of any other exception that comes from a plug-in."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        place = find_plugin_line(error)
        if place is None:
            raise
        raise UsageError(f"{place[0]}:{place[1]}: {type(error).__name__}: {' '.join(str(error).split())}") from error
