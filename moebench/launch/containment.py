"""Contain the failures of what only shows, draws, tracks, records or tidies: they are reported and end nothing."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


class Containment:
    """Collects the failures of side effects of a run: training alone decides how a cell ends."""

    def __init__(self, on_problem: Callable[[str], None] = lambda line: None) -> None:
        """`on_problem` is called with the line of each new problem; what it raises is dropped."""
        self.problems: list[str] = []
        """One line for each different failure, in order."""
        self._on_problem = on_problem

    @contextlib.contextmanager
    def contain(self, action: str) -> Iterator[None]:
        """Suppress and record what the block raises; Ctrl-C passes.

        SystemExit is suppressed too: libraries raise it when a stream is closed.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            self.add(f"{action}: {describe_with_location(error)}")

    def add(self, line: str) -> None:
        """Record a problem, unless it has been recorded before."""
        if line not in self.problems:
            self.problems.append(line)
            with contextlib.suppress(Exception, SystemExit):
                self._on_problem(line)


def describe_with_location(error: BaseException) -> str:
    """Return an exception in one line, with the innermost line of moebench that it passed."""
    text = " ".join(str(error).split())[:300]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
    inner = [frame for frame in frames if frame.filename != __file__]
    location = f" ({Path(inner[-1].filename).relative_to(PACKAGE.parent)}:{inner[-1].lineno})" if inner else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{location}"
