"""Which files of a folder are read, and what a folder's names say about the split."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moebench.errors import UsageError, nearest
from moebench.tasks.sources import first_line, note

TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")
_WORD = "(?P<train>train(ing)?)|(?P<validation>val(id(ation)?)?|dev)|(?P<test>test(ing)?)"
_FOLDER = re.compile(_WORD, re.IGNORECASE)
_FILE = re.compile(rf"({_WORD})(?![a-z])", re.IGNORECASE)


def existing(path: str, advice: str = "") -> Path:
    """Return the file or folder that task.data.path names.

    Raises `UsageError` with the nearest name, and the advice, where it is not.
    """
    root = Path(path).expanduser()
    try:
        if root.exists():
            return root
        near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
    except OSError as error:
        raise UsageError(f"task.data.path: '{path}' cannot be read ({first_line(error)})") from error
    raise UsageError(f"task.data.path: '{path}' does not exist.{near}{advice}")


def files_below(root: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Return the files that end so by their name inside the folder, sorted; a file by its own name.

    Links are followed. Left out is what is hidden: names that begin with a dot, folders that begin with two
    underscores. A link to nothing stays: whoever reads it says so. Raises `UsageError` for a folder that cannot be
    listed.
    """
    paths = [root] if root.is_file() else _below(root, frozenset())
    ended = (path for path in paths if path.name.lower().endswith(tuple(endings)))
    return {path.relative_to(root).as_posix() if path != root else root.name: path for path in ended}


def tell_unread(path: str | None, endings: Sequence[str]) -> None:
    """Say on standard error how many files of a folder end otherwise, so that none is left out in silence."""
    root = None if path is None else existing(path)
    if root is None or root.is_file():
        return
    others = [file for file in _below(root, frozenset()) if not file.name.lower().endswith(tuple(endings))]
    if others:
        kinds = Counter(file.suffix.lower() or "no ending" for file in others)
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
        note(f"below '{path}' lie {len(others)} file(s) of other kinds, which are not read ({listed})")


def parts_of(names: Iterable[str], *, by_file: bool) -> dict[str, str]:
    """Return which part (train, validation or test) each file belongs to, or nothing if the names do not say.

    They say it where each file lies in a folder called train, val, test or the like; with `by_file`, also where its
    own name begins so, as in train-0.parquet. A single such part is all there is, and is divided like any other.
    Raises `UsageError` where some files have a part and others have none.
    """
    found = {name: _part(name, by_file=by_file) for name in names}
    kinds = set(found.values())
    by_name = any(part and not _part(name, by_file=False) for name, part in found.items())
    if "" in kinds and len(kinds) <= 2 and not by_name:  # one folder called so may be a class: trains on pictures
        return {}
    if "" in kinds:
        stray = next(name for name, part in found.items() if not part)
        raise UsageError(f"task.data.path: '{stray}' lies beside the parts {_listed(kinds)}, and is in none; move it")
    if len(kinds) == 1:
        return dict.fromkeys(found, TRAIN)
    if TRAIN not in kinds:
        raise UsageError(f"task.data.path: there are the parts {_listed(kinds)}, and no train")
    return found


def folders_of(name: str, *, divided: bool) -> list[str]:
    """Return the folders that a file lies in, from the top, without the one that names its part."""
    folders = name.split("/")[:-1]
    place = next((place for place, folder in enumerate(folders) if divided and _FOLDER.fullmatch(folder)), len(folders))
    return folders[:place] + folders[place + 1 :]


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    try:
        real = folder.resolve()
        paths = [] if real in above else sorted(folder.iterdir())  # a link to a folder above it would never end
    except OSError as error:
        raise UsageError(f"task.data.path: folder '{folder}' cannot be listed ({first_line(error)})") from error
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith("__"):
                yield from _below(path, above | {real})
        elif path.is_file() or not path.exists():  # neither sockets nor pipes, which would wait for ever
            yield path


def _part(name: str, *, by_file: bool) -> str:
    *folders, file = name.split("/")
    found = next((match for folder in folders if (match := _FOLDER.fullmatch(folder))), None)
    if found is None and by_file:
        found = _FILE.match(file)
    return next((part for part in PARTS if found is not None and found[part]), "")


def _listed(kinds: Iterable[str]) -> str:
    return " and ".join(part for part in PARTS if part in kinds)
