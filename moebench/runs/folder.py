"""The folder of one run: the paths of its files, and the state of the run that follows from them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.file_access import read_plain_file, require_plain_name
from moebench.parallel.manifest import list_manifests, parse_step
from moebench.runs.checked_json import Types, add_checksum, pop_checksum, require_types
from moebench.runs.checked_json import read_json as read_json
from moebench.runs.result import RunResult

CELL_TYPES: dict[str, Types] = {
    "id": str,
    "arm": str,
    "seed": int,
    "experiment": str,
    "config": dict,
    "data": dict,
    "varies": dict,
    "plugins": list,
    "plugin_digests": list,
    "version": str,
}
INIT_TYPES: dict[str, Types] = {
    "parent": str,
    **dict.fromkeys(("taken", "new", "zeroed", "unused", "new_experts"), dict),
    **dict.fromkeys(("taken_params", "new_params"), int),
}
INIT_OPTIONAL = ("zeroed", "new_experts")
KEPT = "kept"
"""Folder below the checkpoints: a run never resumes from what is in it."""

CELL_OPTIONAL = ("varies", "plugins", "plugin_digests", "version")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run under results/runs/ID."""

    path: Path

    @classmethod
    def of(cls, results: Path, cell_id: str) -> "RunFolder":
        """Return the folder of a cell; raise UsageError for an id, read from a file, that is a path."""
        return cls(results / "runs" / require_plain_name(cell_id, "id of a run"))

    @property
    def cell(self) -> Path:
        """The cell: id, arm, seed, resolved configuration."""
        return self.path / "cell.json"

    @property
    def journal(self) -> Path:
        """Metrics, one line per point."""
        return self.path / "journal.jsonl"

    @property
    def loads(self) -> Path:
        """Load of every expert, one line per evaluation."""
        return self.path / "load.jsonl"

    @property
    def layers(self) -> Path:
        """Series of each MoE layer, one line per logged step; `runs.layer_series` reads it."""
        return self.path / "layers.jsonl"

    @property
    def labels(self) -> Path:
        """Assignments of each label to each expert, of the trained model."""
        return self.path / "labels.json"

    @property
    def init(self) -> Path:
        """Record of what the model has taken from its parent before the first step; only with `init.from`."""
        return self.path / "init.json"

    @property
    def result(self) -> Path:
        """The RunResult; exists when the run is done or has failed."""
        return self.path / "result.json"

    @property
    def attempts(self) -> Path:
        """Each start of the run and how it ended, one per line."""
        return self.path / "attempts.jsonl"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        """Output of rank 0, with the traceback of a failure."""
        return self.log_for_rank(0)

    def log_for_rank(self, rank: int) -> Path:
        """Return the log of one of the cell's processes."""
        return self.path / (f"log.rank{rank}.txt" if rank else "log.txt")

    @property
    def checkpoints(self) -> Path:
        """Checkpoints and their manifests."""
        return self.path / "checkpoints"

    @property
    def kept_weights(self) -> Path:
        """Weights of earlier steps (`train.keep_checkpoints`) and their manifests."""
        return self.checkpoints / KEPT

    @property
    def lock(self) -> Path:
        """Lock file, held while the cell is trained."""
        return self.path / ".lock"

    @property
    def records(self) -> list[Path]:
        """Files that a finished run does not change any more."""
        return [path for path in (self.journal, self.loads, self.layers, self.labels, self.init) if path.exists()]

    def read_cell(self) -> dict[str, Any]:
        """Return the content of `cell.json`; raise UsageError if it is missing, damaged or that of another cell."""
        try:
            cell = pop_checksum(read_json(self.cell))
            require_types(cell, CELL_TYPES, CELL_OPTIONAL)
            require_types(cell["data"], {"name": str, "digest": str})
            if not all(isinstance(text, str) for text in (*cell.get("plugins", ()), *cell.get("plugin_digests", ()))):
                raise ValueError("'plugins' and 'plugin_digests' must hold texts")
            self._require_id(cell["id"])
        except ValueError as error:
            raise UsageError(f"{self.cell}: damaged ({error}); `moebench run` of its experiment writes it") from error
        return {"plugins": [], **cell}

    def write_cell(self, cell: Mapping[str, Any]) -> None:
        """Write `cell.json`, from `Cell.to_dict`, and create the folder if needed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.cell, add_checksum(cell))

    def read_result(self) -> RunResult | None:
        """Return the result, or None if there is none yet; raise UsageError if it is damaged or that of another run."""
        try:
            values = json.loads(read_plain_file(self.result))
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, expected an object")
            result = RunResult.from_dict(pop_checksum(values))
            self._require_id(result.id)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{self.result}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"{self.result}: damaged ({error}); delete it to run the cell again") from error
        return result

    def read_init(self) -> dict[str, Any] | None:
        """Return what the model has taken from its parent, None without a parent; raise UsageError if it is damaged."""
        if not self.init.exists():
            return None
        try:
            values = pop_checksum(read_json(self.init))
            require_types(values, INIT_TYPES, INIT_OPTIONAL)
        except ValueError as error:
            raise UsageError(f"{self.init}: damaged ({error})") from error
        return values

    def write_result(self, result: RunResult) -> None:
        """Write `result.json`, with a checksum."""
        write_json(self.result, add_checksum(result.to_dict()))

    def _require_id(self, cell_id: str) -> None:
        name = self.path.absolute().name
        if cell_id != name:
            raise ValueError(f"it is of the run {cell_id[:40]}, in the folder of {name}")

    def digest_records(self) -> dict[str, str]:
        """Return the SHA-256 (hex) of each of `records`, by name."""
        return {path.name: _digest(read_plain_file(path, None)) for path in self.records}

    def require_unchanged(self, file: Path) -> None:
        """Raise UsageError if one of `records` is not as it was when the run was done.

        Passes where that is not recorded: the run is not done, or was trained by an earlier version.
        """
        result = self.read_result()
        if result is not None and file.name in result.records:
            self.read_record(file, result)

    def read_record(self, file: Path, result: RunResult | None) -> bytes | None:
        """Return the content of one of `records`, None where there is no such file.

        Raises UsageError where it cannot be read, or is not as it was when the run with this result was done.
        """
        try:
            content = read_plain_file(file, None)
        except FileNotFoundError:
            content = None
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
        expected = result.records.get(file.name) if result else None
        if expected is not None and (content is None or _digest(content) != expected):
            raise UsageError(f"{file}: was changed after the run was done; restore it, or train the cell again")
        return content

    def state(self) -> str:
        """Return done, failed, resumable (a checkpoint exists) or new."""
        result = self.read_result()
        if result is not None:
            return result.status
        return "resumable" if self.checkpointed_step >= 0 else "new"

    def describe_state(self) -> str:
        """Return `state`, or training where a process trains the run."""
        state = self.state()
        return "training" if state != "done" and self.is_being_trained() else state

    def is_being_trained(self, *, if_unreadable: bool = False) -> bool:
        """Return whether a process holds the lock of the run; `if_unreadable` where the lock cannot be opened."""
        if not self.lock.exists():
            return False
        try:
            with FileLock(self.lock, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return if_unreadable

    @property
    def checkpointed_step(self) -> int:
        """Step of the newest checkpoint, -1 without one: a resumed run repeats only later steps."""
        return max(map(parse_step, list_manifests(self.checkpoints)), default=-1)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def list_run_folders(results: Path) -> list[RunFolder]:
    """Return the folders of all runs, by id; raise UsageError if the results folder cannot be read."""
    runs = results / "runs"
    try:
        paths = sorted(path for path in runs.iterdir() if not path.name.startswith("."))
        return [RunFolder(path) for path in paths if (path / "cell.json").exists()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{runs}: cannot be read as the folder of runs ({error.strerror})") from error


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part of it.

    Its folder must exist: a folder that was deleted during a run must not come back with a part of its files.
    """
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(file, json.dumps(value, indent=1, sort_keys=True) + "\n")
