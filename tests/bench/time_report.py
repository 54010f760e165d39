"""Time `moebench compare` and `moebench report` on a results folder of many stored runs.

    python tests/bench/time_report.py [RUNS] [FOLDER]

Writes the runs (500 by default, 5 seeds) and prints the CPU seconds of both commands, each in a process of its own.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.stored_grid import Grid, write_grid

SEEDS = 5


def main(num_runs: int, folder: Path) -> None:
    """Write the runs, unless they are there, and time the commands."""
    if not (folder / "results").exists():
        started = time.perf_counter()
        write_grid(folder, Grid(arms=num_runs // SEEDS, seeds=SEEDS, points=120))
        print(f"{num_runs} runs written in {time.perf_counter() - started:.1f} s")
    for command in ("compare", "report"):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        file, results = str(folder / "stored.yaml"), str(folder / "results")
        arguments = [sys.executable, "-m", "moebench", command, file, "--results", results]
        completed = subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wall_s = time.perf_counter() - started
        print(f"{command}: exit code {completed.returncode}, {cpu_s:.1f} CPU seconds, {wall_s:.1f} s")


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    if len(sys.argv) > 2:
        main(runs, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(runs, Path(temporary))
