"""Read what runs leave in a results folder, without using moebench."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMING_METRICS = ("train/tokens_per_s", "train/mfu", "time/data_share", "time/train_s")
"""Metrics of a journal that measure the machine, not the model."""


@dataclass(frozen=True)
class Results:
    """Reads a results folder without using moebench."""

    path: Path

    def folders(self) -> list[Path]:
        """Return the folders of all runs."""
        return sorted(file.parent for file in (self.path / "runs").glob("*/cell.json"))

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder of one run."""
        cells = {folder: json.loads((folder / "cell.json").read_text()) for folder in self.folders()}
        (folder,) = [path for path, cell in cells.items() if (cell["arm"], cell["seed"]) == (arm, seed)]
        return folder

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the result of one run; fail if it is missing or not JSON."""
        result: dict[str, Any] = json.loads((self.folder(arm, seed) / "result.json").read_text())
        return result

    def statuses(self) -> dict[tuple[str, int], str]:
        """Return (arm, seed) -> status of the runs that have a result."""
        results = [json.loads(file.read_text()) for file in sorted((self.path / "runs").glob("*/result.json"))]
        return {(result["arm"], result["seed"]): result["status"] for result in results}

    def written_at(self) -> dict[str, int]:
        """Return result file -> time of its last change, in nanoseconds."""
        return {str(file): file.stat().st_mtime_ns for file in (self.path / "runs").glob("*/result.json")}


def journal(folder: Path) -> list[dict[str, Any]]:
    """Return the points of a run."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def deterministic_points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return steps and metrics of a run without times and speeds: equal, bit for bit, for the same cell."""
    points = journal(folder)
    return [
        (p["step"], {k: v for k, v in p["metrics"].items() if not k.startswith((*TIMING_METRICS, "system/"))})
        for p in points
    ]


def drop_measured(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without what depends on time: throughput, digests of files with times, the state of the tree."""
    return {key: value for key, value in result.items() if key not in ("throughput", "records", "checksum", "version")}


def drop_throughput(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison without the throughput of its arms, and without what is read from times."""
    arms = {arm: {k: v for k, v in row.items() if k != "throughput"} for arm, row in comparison["arms"].items()}
    return {**{k: v for k, v in comparison.items() if k != "fairness"}, "arms": arms}


def last_step(folder: Path) -> int:
    """Return the last step in the journal of a run, 0 if there is none."""
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0
