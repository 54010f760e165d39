"""The folder of one run: the paths of its files, and the state of the run that follows from them."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.result import RunResult


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
    def labels(self) -> Path:
        """Assignments of each label to each expert, of the trained model."""
        return self.path / "labels.json"

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
    def lock(self) -> Path:
        """Lock file, held while the cell is trained."""
        return self.path / ".lock"

    def read_cell(self) -> dict[str, Any]:
        """Return the content of `cell.json`; raise UsageError if it is missing or damaged."""
        return read_json(self.cell)

    def read_result(self) -> RunResult | None:
        """Return the result, or None if there is none yet; raise UsageError if the file is damaged."""
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
        return "resumable" if self.checkpointed_step >= 0 else "new"

    @property
    def checkpointed_step(self) -> int:
        """Step of the newest checkpoint, -1 without one: a resumed run repeats only later steps."""
        return max((int(path.stem.removeprefix("step_")) for path in self.checkpoints.glob("step_*.json")), default=-1)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise UsageError naming the file if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part of it."""
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
