"""The cores that a process may use, from mocked affinity masks and control groups."""

import os
from pathlib import Path

import pytest

from moebench.cores import available_cores


def write_files(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Write the list of the process's control groups and the tree of all; return both paths."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "self", folder / "sys"


V1 = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n"
CASES = {
    "no groups": ({}, 8),
    "no quota": ({"self": "0::/user\n", "sys/user/cpu.max": "max 100000\n", "sys/cpu.stat": ""}, 8),
    "v2": ({"self": "0::/user\n", "sys/user/cpu.max": "300000 100000\n"}, 3),
    "v2, another period": ({"self": "0::/user\n", "sys/user/cpu.max": "100000 20000\n"}, 5),
    "v2, less than the whole": ({"self": "0::/user\n", "sys/user/cpu.max": "290000 100000\n"}, 2),
    "v2, less than one": ({"self": "0::/user\n", "sys/user/cpu.max": "20000 100000\n"}, 1),
    "v2, more than the mask": ({"self": "0::/user\n", "sys/user/cpu.max": "6400000 100000\n"}, 8),
    "v2, the group above has less": (
        {"self": "0::/a/b/c\n", "sys/a/b/c/cpu.max": "max 100000\n", "sys/a/b/cpu.max": "400000 100000\n"}
        | {"sys/a/cpu.max": "200000 100000\n", "sys/cpu.max": "700000 100000\n"},
        2,
    ),
    "v2, in a namespace of its own": ({"self": "0::/\n", "sys/cpu.max": "200000 100000\n"}, 2),
    "v2, above the namespace": ({"self": "0::/../../other\n", "sys/cpu.max": "200000 100000\n"}, 2),
    "v2, a broken file": ({"self": "0::/user\n", "sys/user/cpu.max": "many\n"}, 8),
    "v1": (
        {"self": V1, "sys/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "200000\n"}
        | {"sys/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "v1, no quota": (
        {"self": V1, "sys/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "-1\n"}
        | {"sys/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "v1, in a container that sees its group as the root": (
        {"self": V1, "sys/cpu/cpu.cfs_quota_us": "150000\n", "sys/cpu/cpu.cfs_period_us": "50000\n"},
        3,
    ),
    "v1, the group above has less": (
        {"self": V1, "sys/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "500000\n"}
        | {"sys/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n"}
        | {"sys/cpu,cpuacct/docker/cpu.cfs_quota_us": "400000\n"}
        | {"sys/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n"},
        4,
    ),
    "both, the CPU under v1": (
        {"self": V1.replace("0::/", "0::/user"), "sys/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "600000\n"}
        | {"sys/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n", "sys/unified/user/cgroup.procs": ""},
        6,
    ),
    "a cpuset is no quota": ({"self": "3:cpuset:/small\n", "sys/cpuset/small/cpuset.cpus": "0-1\n"}, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_quotas_and_affinity_mask(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cores = CASES[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert available_cores(*write_files(tmp_path, files)) == cores


def test_a_mask_that_is_smaller_than_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 17})
    files = {"self": "0::/user\n", "sys/user/cpu.max": "400000 100000\n"}
    assert available_cores(*write_files(tmp_path, files)) == 2


def test_without_masks_all_cores_of_the_machine_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert available_cores(*write_files(tmp_path, {})) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(*write_files(tmp_path, {})) == 1


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_no_other_module_counts_cores() -> None:
    import moebench

    package = Path(moebench.__file__).parent
    users = {str(file.relative_to(package)) for file in package.rglob("*.py") if "cpu_count" in file.read_text()}
    assert users == {"cores.py", "bench/contention.py"}  # the second needs all cores, to measure their load
