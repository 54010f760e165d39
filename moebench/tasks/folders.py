"""The files below a folder, and the splits that names of folders and files assign."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moebench.errors import UsageError, suggest
from moebench.file_access import is_utf8, require_utf8
from moebench.tasks.sources import first_line, warn

TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")
_WORD = "(?P<train>train(ing)?)|(?P<validation>val(id(ation)?)?|dev)|(?P<test>test(ing)?)"
_FOLDER = re.compile(_WORD, re.IGNORECASE)
_FILE = re.compile(rf"({_WORD})(?![a-z])", re.IGNORECASE)


def find_source(path: str, advice: str = "") -> Path:
    """Return the file or folder that task.data.path names.

    Raises UsageError with the nearest name and `advice` if it does not exist.
    """
    root = Path(path).expanduser()
    require_utf8(root, "task.data.path:")
    try:
        if root.exists():
            return root
        near = suggest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
    except OSError as error:
        raise UsageError(f"task.data.path: '{path}' cannot be read ({first_line(error)})") from error
    raise UsageError(f"task.data.path: '{path}' does not exist.{near}{advice}")


def list_files(root: Path, endings: Sequence[str]) -> dict[str, Path]:
    r"""Return the files below `root` with one of the endings, sorted, by their path relative to it.

    If `root` is a file, it is returned by its name. Links are followed. Hidden names are skipped: those that begin with
    a dot, and folders that begin with two underscores. Broken links are kept, so that reading them fails. In names that
    are not UTF-8, bytes are written as \xNN. Raises UsageError for a folder that cannot be listed.
    """
    paths = [root] if root.is_file() else _walk(root, frozenset())
    matching = (path for path in paths if path.name.lower().endswith(tuple(endings)))
    files: dict[str, Path] = {}
    for path in matching:
        name = format_relative_path(path, root if path != root else root.parent)
        if name in files:
            raise UsageError(
                f"task.data.path: there are two files '{name}', and one of the names is not UTF-8; rename one"
            )
        files[name] = path
    return files


def format_relative_path(path: Path, root: Path) -> str:
    r"""Return the path of a file relative to a folder, as text: bytes that are not UTF-8 are written as \xNN."""
    name = path.relative_to(root).as_posix()
    return name if is_utf8(name) else os.fsencode(name).decode(errors="backslashreplace")


def warn_unread_files(path: str | None, endings: Sequence[str]) -> None:
    """Print how many files of a folder have other endings and are therefore not read."""
    root = None if path is None else find_source(path)
    if root is None or root.is_file():
        return
    others = [file for file in _walk(root, frozenset()) if not file.name.lower().endswith(tuple(endings))]
    if others:
        kinds = Counter(file.suffix.lower() or "no ending" for file in others)
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
        warn(f"'{path}' has {len(others)} file(s) of other kinds, which are not read ({counts})")


def assign_parts(names: Iterable[str], *, by_file: bool) -> dict[str, str]:
    """Return the part (train, validation or test) of each file, or an empty mapping if names assign none.

    A file is assigned by a folder named train, val, test or the like; with `by_file` also by the beginning of its own
    name, as in train-0.parquet. If there is a single part, it is all of the data, to be divided like unassigned data.
    Raises UsageError if some files have a part and others have none.
    """
    part_of = {name: _part(name, by_file=by_file) for name in names}
    parts = set(part_of.values())
    by_own_name = any(part and not _part(name, by_file=False) for name, part in part_of.items())
    if "" in parts and len(parts) <= 2 and not by_own_name:  # a single folder `train` may be a class of images
        return {}
    if "" in parts:
        stray = next(name for name, part in part_of.items() if not part)
        raise UsageError(
            f"task.data.path: '{stray}' belongs to no split, but other files belong to {_join_parts(parts)}; move it"
        )
    if len(parts) == 1:
        return dict.fromkeys(part_of, TRAIN)
    if TRAIN not in parts:
        raise UsageError(f"task.data.path: there are the splits {_join_parts(parts)}, but no train")
    return part_of


def list_parent_folders(name: str, *, divided: bool) -> list[str]:
    """Return the folders of a file from the top; if files are divided into parts, without the folder of its part."""
    folders = name.split("/")[:-1]
    matches = (i for i, folder in enumerate(folders) if divided and _FOLDER.fullmatch(folder))
    index = next(matches, len(folders))
    return folders[:index] + folders[index + 1 :]


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    try:
        real = folder.resolve()
        paths = [] if real in above else sorted(folder.iterdir())  # do not follow links to a parent
    except OSError as error:
        raise UsageError(f"task.data.path: folder '{folder}' cannot be listed ({first_line(error)})") from error
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith("__"):
                yield from _walk(path, above | {real})
        elif path.is_file() or not path.exists():  # not sockets or pipes, which would block
            yield path


def _part(name: str, *, by_file: bool) -> str:
    *folders, file = name.split("/")
    match = next((match for folder in folders if (match := _FOLDER.fullmatch(folder))), None)
    if match is None and by_file:
        match = _FILE.match(file)
    return next((part for part in PARTS if match is not None and match[part]), "")


def _join_parts(parts: Iterable[str]) -> str:
    return " and ".join(part for part in PARTS if part in parts)
