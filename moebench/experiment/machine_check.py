"""Checks of the machine for `moebench verify`: versions with known faults, disk, devices, write access, clock."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moebench.experiment.store import RESERVED_BYTES
from moebench.experiment.verification import Finding
from moebench.runs.environment import PACKAGES, describe_version, find_version

CLOCK_TOLERANCE_S = 60.0
MALWARE = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Releases on the package index that carried malware (April 2026)."""
MLFLOW_MIN = (3, 13)
"""Earlier ones have advisories of 2026 on path traversal and command execution."""


def describe_machine(results: Path) -> dict[str, Any]:
    """Return versions, devices and free disk, JSON-ready."""
    return {
        "moebench": describe_version(),
        "packages": {name: find_version(name) for name in PACKAGES},
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"],
        "free_bytes": shutil.disk_usage(results).free,
    }


def check_machine(results: Path) -> Iterator[Finding]:
    """Yield what is wrong with the installed packages, the disk and the clock."""
    yield from check_versions({name: find_version(name) for name in (*MALWARE, "mlflow")})
    free = shutil.disk_usage(results).free
    if free < RESERVED_BYTES:
        yield Finding(where=str(results), problem=f"{free / 2**20:.0f} MiB are free", remedy="free some space")
    for folder in (results, results / "runs", results / "experiments"):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(where=str(folder), problem="cannot be written", remedy="correct its permissions")
    limit = time.time() + CLOCK_TOLERANCE_S
    future = [path for path in (results / "runs").glob("*/*") if path.lstat().st_mtime > limit]
    if future:
        problem = f"{len(future)} files are from the future, among them {future[0]}"
        yield Finding(where="clock", problem=problem, remedy="set the clock of this machine or of the other one")


def check_versions(versions: dict[str, str | None]) -> Iterator[Finding]:
    """Yield the packages whose installed version has a known fault."""
    for name, version in versions.items():
        if version in MALWARE.get(name, ()):
            problem = f"version {version} carried malware"
            yield Finding(where=name, problem=problem, remedy="remove it, renew credentials, install 2.6.5 or later")
    mlflow = versions.get("mlflow")
    if mlflow and tuple(int(part) for part in mlflow.split(".")[:2] if part.isdigit()) < MLFLOW_MIN:
        yield Finding(where="mlflow", problem=f"version {mlflow} has known security faults", remedy="install 3.13")
