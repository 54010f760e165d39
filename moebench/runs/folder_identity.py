"""Notice that a folder was deleted, moved or replaced while it is written to."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from moebench.errors import UsageError


class FolderIdentity:
    """The folder that a path leads to when this is created; it is held open, so that no other can take its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def require_in_place(self) -> None:
        """Raise UsageError unless the path still leads to the same folder."""
        try:
            is_in_place = os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            is_in_place = False
        if not is_in_place:
            raise UsageError(
                f"results folder {self.path}: was deleted or moved during the run, which has been stopped; if it is"
                " elsewhere now, continue with --results FOLDER"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
