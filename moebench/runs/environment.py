"""The environment of a run: versions, machine, state of the code."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import moebench
from moebench.cores import available_cores
from moebench.routing.kernels.backend import read_choice

PACKAGES = ("torch", "lightning", "numpy", "datasets", "tokenizers", "mlflow", "scipy")


def collect_environment(threads: int) -> dict[str, Any]:
    """Return the environment of a run as JSON-ready values."""
    commit = _git("rev-parse", "HEAD")
    return {
        "moebench": moebench.__version__,
        "version": describe_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": threads,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "kernels": read_choice(),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "packages": {name: find_version(name) for name in PACKAGES},
    }


@cache
def describe_version() -> str:
    """Return the version of moebench and the first digits of the SHA-256 of its code."""
    package = Path(moebench.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{moebench.__version__} ({digest.hexdigest()[:12]})"


def find_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git(*arguments: str) -> str | None:
    """Run git on the code that moebench is imported from; return None if it is not a checkout."""
    folder = Path(moebench.__file__).parent
    try:
        # Without the monitor that a repository's own settings may name: it is a program.
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
