"""Commands that messages recommend: they can be pasted into a shell, and reach the same results folder."""

import shlex
from pathlib import Path

DEFAULT_RESULTS = Path("results")


def format_command(name: str, *arguments: str, results: Path = DEFAULT_RESULTS) -> str:
    """Return a command of moebench, quoted for the shell, with `--results` unless it is the default."""
    return shlex.join(["moebench", *name.split(), *arguments, *format_results(results)])


def format_results(results: Path) -> list[str]:
    """Return the option that names a results folder; empty for the default."""
    return [] if results == DEFAULT_RESULTS else ["--results", str(results)]
