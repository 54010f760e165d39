"""The share of the machine that other processes use during a measurement."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC_STAT = Path("/proc/stat")
_NUM_COLUMNS = 8
"""Columns of /proc/stat: user nice system idle iowait irq softirq steal; guest time is included in user."""
_IDLE_COLUMNS = (3, 4)
"""idle and iowait."""


def parse_busy_seconds(stat: str, ticks_per_s: float) -> float:
    """Return the busy seconds of all cores together since boot, from the text of /proc/stat.

    Time stolen by other guests of the hypervisor is included.
    """
    first = stat.split("\n", maxsplit=1)[0].split()
    ticks = [int(value) for value in first[1 : 1 + _NUM_COLUMNS]]
    return (sum(ticks) - sum(ticks[column] for column in _IDLE_COLUMNS)) / ticks_per_s


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Clocks read at the same moment, in seconds."""

    wall_s: float
    own_s: float
    """CPU time of this process, all threads."""
    busy_s: float
    """CPU time of the whole machine, stolen time included."""

    def compute_share_of_others(self, later: "Usage", num_cores: int) -> float:
        """Return the share of the machine that other processes used from this moment to a later one, 0 to 1."""
        others_s = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        capacity_s = (later.wall_s - self.wall_s) * num_cores
        return min(max(others_s / capacity_s, 0.0), 1.0) if capacity_s > 0 else 0.0


def read_usage() -> Usage | None:
    """Read the clocks; return None where there is no /proc/stat (not Linux)."""
    if not PROC_STAT.exists():
        return None
    return Usage(
        wall_s=time.perf_counter(),
        own_s=time.process_time(),
        busy_s=parse_busy_seconds(PROC_STAT.read_text(), os.sysconf("SC_CLK_TCK")),
    )


def measure_share_of_others(start: Usage | None) -> float | None:
    """Return the share of the machine that others have used since `start`; None where unknown."""
    now = read_usage()
    if start is None or now is None:
        return None
    # All cores of the machine, not those of this process: /proc/stat counts all.
    return start.compute_share_of_others(now, os.cpu_count() or 1)
