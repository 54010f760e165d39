"""Open files of folders that others may have made or written to: no links, no pipes, no path in place of a name."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from moebench.errors import UsageError


def is_plain_name(name: object) -> bool:
    """Return whether a value is the name of a file in a folder, not a path to another one."""
    is_name = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    return is_name and is_utf8(str(name))


def is_utf8(name: str) -> bool:
    """Return whether a name can be stored in files, databases and addresses: old archives have names in other codes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_utf8(path: Path, owner: str) -> None:
    """Raise UsageError, which begins with `owner`, for a path with a name that is not UTF-8."""
    if not is_utf8(str(path.absolute())):
        raise UsageError(f"{owner} {path}: its name is not UTF-8; rename it, or give a link with another name")


def require_plain_name(name: object, owner: str) -> str:
    """Return a name that is used as the name of a file; raise UsageError, which begins with `owner`, for a path."""
    if not is_plain_name(name):
        raise UsageError(
            f"{owner}: {name!r} cannot be the name of a file (allowed: UTF-8 without a slash, not empty, . or ..)"
        )
    return str(name)


def open_member(folder: Path, name: str) -> BufferedReader:
    """Open a file of a folder by its name, for reading.

    Raises ValueError for a name that is a path, OSError for a link and anything else that is not a plain file, which
    may lie elsewhere or have no end.
    """
    if not is_plain_name(name):
        raise ValueError(f"'{name}' is not the name of a file in {folder.name}")
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a plain file", str(folder / name))
    return os.fdopen(descriptor, "rb")


MAX_RECORD_BYTES = 256 * 2**20
"""Larger descriptions of runs, results and checkpoints are refused: those of thousands of domains have a few MiB."""

MAX_MEMORY_SHARE = 4
"""Files of any size are read up to this fraction of the memory: a file without content can claim to have terabytes."""


def read_plain_file(path: Path, max_bytes: int | None = MAX_RECORD_BYTES, offset: int = 0) -> bytes:
    """Return the content of a file from a byte on; raise OSError for a pipe or device, which may have no end.

    `max_bytes`: larger files are refused before they are read; None: those that the memory of the machine can hold.
    """
    with _open_plain(path) as file:
        if max_bytes is None:
            max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MAX_MEMORY_SHARE
        if os.fstat(file.fileno()).st_size - offset > max_bytes:
            raise OSError(errno.EFBIG, f"has more than {max_bytes // 2**20} MiB", str(path))
        file.seek(offset)
        return file.read()


def iter_plain_lines(path: Path, offset: int = 0, max_line_bytes: int = MAX_RECORD_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file from a byte on, with their ends: one at a time is in memory.

    Raises OSError for a pipe or device, and for a line of more than `max_line_bytes`.
    """
    with _open_plain(path) as file:
        file.seek(offset)
        while line := file.readline(max_line_bytes + 1):
            if len(line) > max_line_bytes:
                raise OSError(errno.EFBIG, f"has a line of more than {max_line_bytes // 2**20} MiB", str(path))
            yield line


def _open_plain(path: Path) -> BufferedReader:
    """Open a file for reading; raise OSError for a pipe, a device or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(kind, os.strerror(kind) if kind == errno.EISDIR else "is not a plain file", str(path))


def parse_json(content: bytes | str) -> Any:
    """Return a value written as JSON; raise ValueError for anything else, and for values nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_plain_json(path: Path) -> Any:
    """Return the value in a JSON file; raise OSError as `read_plain_file` does, ValueError as `parse_json`."""
    return parse_json(read_plain_file(path))


def open_to_write(file: Path, flags: int = os.O_APPEND) -> int:
    """Return the descriptor of a file that is created if missing; raise OSError in place of following a link.

    A pipe or a device is refused too: a pipe without a reader would block the run.
    """
    no_wait = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | no_wait | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "is not a plain file", str(file)) from error
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(file)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a plain file", str(file))
    os.set_blocking(descriptor, True)
    return descriptor


def require_no_links(folder: Path, *, is_deep: bool = False) -> None:
    """Raise UsageError for a symbolic link in a folder (with `is_deep` also below it) that will be written to.

    A link would let whoever made it choose another file of ours to be overwritten. A missing folder has none.
    """
    for path in _list_links(folder, is_deep=is_deep):
        raise UsageError(f"{path}: is a symbolic link; moebench writes there and does not follow it. Remove the link")


def _list_links(folder: Path, *, is_deep: bool) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # missing, or reported by what writes there
        return
    for entry in entries:
        if entry.is_symlink():
            yield Path(entry.path)
        elif is_deep and entry.is_dir(follow_symlinks=False):
            yield from _list_links(Path(entry.path), is_deep=True)
