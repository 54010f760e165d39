"""How many cores this process may use: fewer than the machine has, on a shared node or in a container."""

import os
from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_cores(own_groups: Path = OWN_GROUPS, groups: Path = GROUPS) -> int:
    """Return the whole cores that this process may keep busy, at least 1.

    These are the CPUs of its affinity mask (cpusets and `taskset` are in it), or what the CPU quotas of its control
    groups come to, if that is less: each group's, and each group's above it. Of 1.5 cores one is counted, since a
    second thread would spend half of its time stopped. `own_groups` and `groups` are where Linux tells of them.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(mask), *_quotas(own_groups, groups)])))


def _quotas(own_groups: Path, groups: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, that this process is under; see cgroups(7)."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # "0::/path" is of version 2, "4:cpu,cpuacct:/path" of version 1.
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            mounts, quota_of = (groups, groups / "unified"), _quota_of_v2
        elif "cpu" in controllers.split(","):
            mounts, quota_of = (groups / controllers, groups / "cpu"), _quota_of_v1
        else:
            continue
        mount = next((mount for mount in mounts if mount.is_dir()), groups)
        # In a container the path may be that of the host, which is not mounted: what is found on the way is the own.
        group = Path(os.path.normpath("/" + path.lstrip("/"))).relative_to("/")
        for above in (group, *group.parents):
            quota = quota_of(mount / above)
            if quota is not None:
                yield quota


def _quota_of_v2(folder: Path) -> float | None:
    """Read "max 100000" or "150000 100000": microseconds in each period."""
    words = _read(folder / "cpu.max").split()
    return _cores(words[0], words[1]) if len(words) == 2 else None


def _quota_of_v1(folder: Path) -> float | None:
    """Read two files; the quota is -1 where there is none."""
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
