"""`run --reshard`: start a cell from the checkpoints of the same cell on another mesh, whose id is different."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.file_access import open_member, require_no_links
from moebench.parallel.checkpoint import find_damage
from moebench.parallel.manifest import Manifest, list_manifests
from moebench.registry import load_plugin
from moebench.runs.cell import Cell
from moebench.runs.folder import KEPT, RunFolder, list_run_folders
from moebench.runs.recorder import find_missing
from moebench.training.kept_weights import list_kept_weights

MeshSize = tuple[int, int]
"""parallel.data and parallel.expert."""


def reshard(results: Path, cells: list[Cell]) -> Iterator[str]:
    """Copy to each new cell the checkpoints of its twin, if that is unfinished; yield a line for each copy.

    The twin is the cell that differs only in parallel.data and parallel.expert; its folder is not changed.
    """
    mesh_sizes = _list_mesh_sizes(results)
    for cell in cells:
        target = RunFolder.of(results, cell.id)
        if target.checkpointed_step >= 0:
            continue
        candidates = [(RunFolder.of(results, twin_id), size) for twin_id, size in _twin_ids(cell, mesh_sizes)]
        unfinished = [
            (folder, size) for folder, size in candidates if folder.checkpointed_step >= 0 and folder.state() != "done"
        ]
        if not unfinished:
            continue
        twin, (data, expert) = max(unfinished, key=lambda candidate: candidate[0].checkpointed_step)
        prefix = f"{cell.arm} seed {cell.seed}: {twin.path.name} (parallel.data={data} parallel.expert={expert})"
        try:
            num_copied = _copy(twin, target)
        except Timeout:
            yield f"{prefix} is being trained by another process; not copied"
            continue
        if not num_copied:
            yield f"{prefix} has no undamaged checkpoint; not copied"
        else:
            yield f"{prefix} is copied; it continues from step {target.checkpointed_step}"


def _list_mesh_sizes(results: Path) -> list[MeshSize]:
    """Return the meshes of all runs."""
    sizes: set[MeshSize] = set()
    for folder in list_run_folders(results):
        try:
            parallel = folder.read_cell()["config"]["parallel"]
            sizes.add((int(parallel["data"]), int(parallel["expert"])))
        except (UsageError, KeyError, TypeError):
            continue  # damaged, or written by an earlier version
    return sorted(sizes)


def _twin_ids(cell: Cell, sizes: list[MeshSize]) -> Iterator[tuple[str, MeshSize]]:
    """Yield the ids of the cell on other meshes."""
    plugins = [load_plugin(plugin).digest for plugin in cell.plugins]
    for data, expert in sizes:
        parallel = replace(cell.config.parallel, data=data, expert=expert, nodes=1, devices=None)
        twin_id = cell_id(replace(cell.config, parallel=parallel), cell.data_digest, plugins)
        if twin_id != cell.id:
            yield twin_id, (data, expert)


def _copy(source: RunFolder, target: RunFolder) -> int:
    """Copy records and undamaged checkpoints, which make the cell resumable, last and atomically.

    Returns the number of checkpoints. Raises UsageError if the disk is too small, or for links.
    """
    target.path.mkdir(parents=True, exist_ok=True)
    temporary = target.path / ".reshard.tmp"
    require_no_links(source.path, is_deep=True)
    require_no_links(target.path, is_deep=True)
    with FileLock(source.lock, timeout=0), FileLock(target.lock, timeout=0):
        shutil.rmtree(temporary, ignore_errors=True)
        manifests = [path for path in list_manifests(source.checkpoints) if not _find_damage(path, source)]
        if not manifests:
            return 0
        kept = [path.with_suffix(".json") for path in list_kept_weights(source)[0].values()]
        _require_space([*manifests, *kept], target.path)
        (temporary / "checkpoints" / KEPT).mkdir(parents=True)
        try:
            target.result.unlink(missing_ok=True)  # of an attempt that failed before its first checkpoint
            files = (source.journal, target.journal), (source.loads, target.loads), (source.layers, target.layers)
            for original, copy in files:
                if original.exists():
                    _copy_file(original.parent, original.name, temporary / copy.name)
                    (temporary / copy.name).replace(copy)
            for path in manifests:
                _copy_checkpoint(path, temporary / "checkpoints", target.path.name)
            for path in kept:
                _copy_checkpoint(path, temporary / "checkpoints" / KEPT, target.path.name)
            shutil.rmtree(target.checkpoints, ignore_errors=True)
            (temporary / "checkpoints").replace(target.checkpoints)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return len(manifests)


def _find_damage(path: Path, source: RunFolder) -> str | None:
    """Return why the checkpoint of a manifest would not be resumed from in its own folder, None if it would."""

    def check(manifest: Manifest) -> str | None:
        is_own = manifest.cell in (None, source.path.name)
        return find_missing(source, manifest.records) if is_own else f"it is of the cell {manifest.cell}"

    return find_damage(path, check)


def _copy_checkpoint(path: Path, folder: Path, cell_id: str) -> None:
    """Copy the files that a manifest lists, and write a manifest for the other cell."""
    manifest, checkpoint = Manifest.read(path), path.with_suffix(".ckpt")
    (folder / checkpoint.name).mkdir()
    for name in manifest.sha256:
        _copy_file(checkpoint, name, folder / checkpoint.name / name)
    (folder / path.name).write_text(replace(manifest, cell=cell_id).to_json())


def _copy_file(folder: Path, name: str, copy: Path) -> None:
    with open_member(folder, name) as original, copy.open("xb") as file:
        shutil.copyfileobj(original, file, 1 << 20)


def _require_space(manifests: list[Path], folder: Path) -> None:
    """Raise UsageError if the disk is too small for what the manifests list."""
    sizes = [file.lstat().st_size for path in manifests for file in path.with_suffix(".ckpt").iterdir()]
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"--reshard: {folder} needs {needed / 2**30:.2f} GiB for copies of checkpoints, {free / 2**30:.2f} are free"
        )
