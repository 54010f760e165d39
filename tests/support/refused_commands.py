"""What a refused command prints, and the runs that it must not have changed."""

from pathlib import Path
from typing import Any

from support.command_line import CommandResult


def contents(results: Path) -> dict[str, Any]:
    """Return every file of the runs with the time of its last change."""
    return {str(file): file.stat().st_mtime_ns for file in sorted((results / "runs").rglob("*"))}


def assert_refused(ended: CommandResult, parts: list[str]) -> None:
    """Fail unless a command ended with exit code 2 and one line that has all of `parts`."""
    assert ended.code == 2, f"exit code {ended.code}: {ended.err[-1500:]}"
    assert ended.out == ""
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    for part in parts:
        assert part in ended.err
