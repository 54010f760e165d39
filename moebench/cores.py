"""Cores and memory that this process may use: on a shared node or in a container, less than the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

PROCESS_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_cores(process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> int:
    """Return the whole cores that this process may keep busy, at least 1.

    The number is that of the CPUs in the affinity mask (set by cpusets and `taskset`), or the smallest CPU quota of
    its control groups and their parents, if that is less. A quota of 1.5 cores counts as one, since a second thread
    would be throttled for half of its time. `process_groups` lists the control groups of this process, `groups` is
    the file system with all of them.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(mask), *_quotas(process_groups, groups)])))


def available_memory(process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> int:
    """Return the bytes of memory that this process may have: those of the machine, or the limit of a control group."""
    names = ("memory.max", "memory.limit_in_bytes")  # version 2, version 1
    limits = [_read(group / name) for group in _list_groups("memory", process_groups, groups) for name in names]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdecimal())])


def _quotas(process_groups: Path, groups: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, that apply to this process; see cgroups(7)."""
    for group in _list_groups("cpu", process_groups, groups):
        for quota in (_quota_of_v2(group), _quota_of_v1(group)):
            if quota is not None:
                yield quota


def _list_groups(controller: str, process_groups: Path, groups: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, and of their parents, that a controller limits."""
    try:
        lines = process_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # "0::/path" is of version 2, "4:cpu,cpuacct:/path" of version 1.
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            mounts = (groups, groups / "unified")
        elif controller in controllers.split(","):
            mounts = (groups / controllers, groups / controller)
        else:
            continue
        mount = next((mount for mount in mounts if mount.is_dir()), groups)
        # In a container the path may be that of the host and not be mounted; its mounted parents still apply.
        group = Path(os.path.normpath("/" + path.lstrip("/"))).relative_to("/")
        for ancestor in (group, *group.parents):
            yield mount / ancestor


def _quota_of_v2(folder: Path) -> float | None:
    """Parse "max 100000" or "150000 100000": microseconds in each period."""
    parts = _read(folder / "cpu.max").split()
    return _cores(parts[0], parts[1]) if len(parts) == 2 else None


def _quota_of_v1(folder: Path) -> float | None:
    """Parse two files; the quota is -1 if there is none."""
    return _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float | None:
    try:
        quota_us, period_us = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
