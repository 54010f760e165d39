"""A file of lines that only grows, and survives a crash at any byte."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from moebench.errors import UsageError
from moebench.file_access import open_to_write, read_plain_file


class AppendOnlyFile:
    """An append-only file of lines.

    Opening it drops a torn last line. Each append is one write to the operating system, so a killed process loses no
    line that was appended; `flush` also guards against a power loss. Appending to a file that was deleted or moved
    would lose lines in silence, so both raise UsageError then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = os.fdopen(open_to_write(self.path), "ab", buffering=0)  # first: it follows no link
        _drop_torn_line(self.path)
        content = read_plain_file(self.path, None)
        self._digest, self._num_bytes = hashlib.sha256(content), len(content)

    def append_line(self, line: bytes) -> None:
        """Add a line without its end; raise OSError for a full disk."""
        line += b"\n"
        self._require_in_place()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
        self._digest.update(line)
        self._num_bytes += len(line)

    def flush(self) -> None:
        """Block until every line is on the disk."""
        self._require_in_place()
        os.fsync(self._file.fileno())

    @property
    def summary(self) -> dict[str, int | str]:
        """Number and SHA-256 (hex) of the bytes written so far."""
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}

    def _require_in_place(self) -> None:
        """Raise UsageError unless the path still leads to the file that is open, with the content written so far."""
        status = os.fstat(self._file.fileno())
        try:
            is_in_place = os.path.samestat(status, os.stat(self.path))
        except OSError:
            is_in_place = False
        if not is_in_place:
            raise UsageError(f"{self.path}: was deleted or moved during the run; nothing more can be recorded")
        if status.st_size != self._num_bytes:
            raise UsageError(
                f"{self.path}: was changed by another program during the run"
                f" ({status.st_size} bytes, {self._num_bytes} were written)"
            )

    def truncate_to(self, num_bytes: int) -> None:
        """Keep the first bytes alone."""
        self._replace(read_plain_file(self.path, None)[:num_bytes])

    def keep_lines(self, is_kept: Callable[[bytes], bool]) -> None:
        """Keep the lines for which a function is true."""
        lines = read_plain_file(self.path, None).splitlines(keepends=True)
        self._replace(b"".join(line for line in lines if is_kept(line)))

    def _replace(self, content: bytes) -> None:
        self._file.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a new file, not one that a link with this name chooses
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._open()

    def close(self) -> None:
        """Flush and close the file."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(UsageError, OSError):  # `error` came first
            self.close()


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = read_plain_file(path, None)
    complete_bytes = content.rfind(b"\n") + 1
    if complete_bytes != len(content):
        os.truncate(path, complete_bytes)
