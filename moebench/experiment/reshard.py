"""A cell on another mesh is another cell; with `--reshard` it begins where its twin on the old mesh has come to."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.registry import load_plugin
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

Size = tuple[int, int]
"""parallel.data and parallel.expert."""


def reshard(results: Path, cells: list[Cell]) -> Iterator[str]:
    """Let each new cell begin from a copy of its twin's checkpoints, if it has an unfinished twin; say so in a line.

    The twin is the same cell but for parallel.data and parallel.expert, and is left as it is.
    """
    sizes = _sizes(results)
    for cell in cells:
        own = RunFolder.of(results, cell.id)
        if own.checkpointed_step >= 0:
            continue
        twins = [(RunFolder.of(results, twin), size) for twin, size in _twins(cell, sizes)]
        unfinished = [(t, size) for t, size in twins if t.checkpointed_step >= 0 and t.state() != "done"]
        if not unfinished:
            continue
        twin, (data, expert) = max(unfinished, key=lambda found: found[0].checkpointed_step)
        what = f"{cell.arm} seed {cell.seed}: {twin.path.name} (parallel.data={data} parallel.expert={expert})"
        try:
            _copy(twin, own)
        except Timeout:
            yield f"{what} is being trained by another process; not copied"
        else:
            yield f"{what} is copied; it goes on from step {own.checkpointed_step}"


def _sizes(results: Path) -> list[Size]:
    """Return the meshes of all runs."""
    found: set[Size] = set()
    for file in (results / "runs").glob("*/cell.json"):
        try:
            parallel = RunFolder(file.parent).read_cell()["config"]["parallel"]
            found.add((int(parallel["data"]), int(parallel["expert"])))
        except (UsageError, KeyError, TypeError):
            continue  # damaged or of an earlier version: nobody's twin
    return sorted(found)


def _twins(cell: Cell, sizes: list[Size]) -> Iterator[tuple[str, Size]]:
    """Yield the ids that the cell would have on other meshes."""
    plugins = [load_plugin(plugin).digest for plugin in cell.plugins]
    for data, expert in sizes:
        parallel = replace(cell.config.parallel, data=data, expert=expert, nodes=1, devices=None)
        twin = cell_id(replace(cell.config, parallel=parallel), cell.data_digest, plugins)
        if twin != cell.id:
            yield twin, (data, expert)


def _copy(twin: RunFolder, own: RunFolder) -> None:
    """Copy journal, loads and checkpoints; the checkpoints, which make the rest count, appear last and all at once."""
    own.path.mkdir(parents=True, exist_ok=True)
    half = own.path / ".reshard.tmp"
    with FileLock(twin.path / ".lock", timeout=0), FileLock(own.path / ".lock", timeout=0):
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        try:
            own.result.unlink(missing_ok=True)  # of an attempt that failed before its first checkpoint
            for theirs, ours in ((twin.journal, own.journal), (twin.loads, own.loads)):
                if theirs.exists():
                    shutil.copyfile(theirs, half / ours.name).replace(ours)
            shutil.copytree(twin.checkpoints, half / "checkpoints", ignore=shutil.ignore_patterns(".step_*"))
            shutil.rmtree(own.checkpoints, ignore_errors=True)
            (half / "checkpoints").replace(own.checkpoints)
        finally:
            shutil.rmtree(half, ignore_errors=True)
