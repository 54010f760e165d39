"""How much of the machine other processes used while something was timed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC_STAT = Path("/proc/stat")
_IDLE_COLUMNS = (3, 4)  # idle and iowait
_COLUMNS = 8  # user nice system idle iowait irq softirq steal; guest time is in user already


def busy_seconds(stat: str, ticks_per_s: float) -> float:
    """Return the seconds that all cores together were not idle since the start, from the text of /proc/stat.

    Time stolen by other guests of the hypervisor counts as busy.
    """
    first = stat.split("\n", maxsplit=1)[0].split()
    ticks = [int(value) for value in first[1 : 1 + _COLUMNS]]
    return (sum(ticks) - sum(ticks[column] for column in _IDLE_COLUMNS)) / ticks_per_s


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Clocks read at one moment, in seconds."""

    wall_s: float
    own_s: float
    """CPU time of this process, all threads."""
    busy_s: float
    """CPU time of the whole machine, stolen time included."""

    def share_of_others(self, later: "Usage", num_cores: int) -> float:
        """Return which share of the machine other processes used from this moment to a later one, 0 to 1."""
        others_s = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        capacity_s = (later.wall_s - self.wall_s) * num_cores
        return min(max(others_s / capacity_s, 0.0), 1.0) if capacity_s > 0 else 0.0


def usage() -> Usage | None:
    """Read the clocks; None where the machine does not tell (not Linux)."""
    if not PROC_STAT.exists():
        return None
    return Usage(
        wall_s=time.perf_counter(),
        own_s=time.process_time(),
        busy_s=busy_seconds(PROC_STAT.read_text(), os.sysconf("SC_CLK_TCK")),
    )


def share_since(start: Usage | None) -> float | None:
    """Return which share of the machine others have used since `start`; None where the machine does not tell."""
    now = usage()
    if start is None or now is None:
        return None
    # All cores of the machine, not those that this process may use: /proc/stat counts what is done on any of them.
    return start.share_of_others(now, os.cpu_count() or 1)
