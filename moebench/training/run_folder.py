"""The folder of one run: where each of its files lies, and what state they say the run is in."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.training.result import RunResult


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run under results/runs/ID."""

    path: Path

    @classmethod
    def of(cls, results: Path, cell_id: str) -> "RunFolder":
        """Return the folder of a cell."""
        return cls(results / "runs" / cell_id)

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
    def result(self) -> Path:
        """The RunResult; there when the run is done or has failed."""
        return self.path / "result.json"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        """What the worker printed, with the traceback of a failure."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints and their manifests."""
        return self.path / "checkpoints"

    def read_cell(self) -> dict[str, Any]:
        """Return what was to be run; raise UsageError when the file is missing or damaged."""
        try:
            cell: dict[str, Any] = json.loads(self.cell.read_text())
            return cell
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.cell}: cannot be read ({error}); delete the folder to start anew") from error

    def read_result(self) -> RunResult | None:
        """Return the result, or None when there is none yet; raise UsageError when the file is damaged."""
        try:
            return RunResult.from_dict(json.loads(self.result.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{self.result}: damaged ({type(error).__name__}); delete it to run the cell again"
            ) from error

    def state(self) -> str:
        """Return done, failed, resumable (a checkpoint exists) or new."""
        result = self.read_result()
        if result is not None:
            return result.status
        return "resumable" if any(self.checkpoints.glob("step_*.json")) else "new"


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
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
