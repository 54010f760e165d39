"""Every process flushes and hashes the files that it wrote, and verifies a part of the files when loading."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from support.process_group import Mesh, Shape
from torch.distributed.tensor import DTensor, Replicate, Shard

import moebench.parallel.checkpoint as files
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_newest_valid


def record_digests(job: Any) -> tuple[Any, list[str]]:
    """Return the result of a job, and the names of the files that it hashed on this process."""
    names: list[str] = []
    digest = files._digest

    def record_and_hash(folder: Path, name: str) -> str:
        names.append(name)
        return digest(folder, name)

    files._digest = record_and_hash
    try:
        return job(), sorted(names)
    finally:
        files._digest = digest


def content(mesh: Mesh) -> dict[str, Any]:
    """Return a checkpoint with a tensor that is sharded over the processes."""
    assert mesh.device_mesh is not None
    shard = torch.full((2, 3), float(mesh.rank))
    sharded = DTensor.from_local(shard, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)
    return {"state_dict": {"w": sharded, "b": torch.ones(4)}, "optimizer_states": [{"step.w": 3}]}


def save(mesh: Mesh, folder: Path) -> list[str]:
    for step in (1, 2):
        _, names = record_digests(
            lambda step=step: VerifiedCheckpointIO(mesh).save_checkpoint(content(mesh), checkpoint_path(folder, step)),
        )
    return names


def load(mesh: Mesh, folder: Path) -> tuple[tuple[Path | None, list[str]], list[str]]:
    return record_digests(lambda: find_newest_valid(folder, mesh))


def test_every_process_hashes_the_files_it_wrote(tmp_path: Path) -> None:
    first, second = Shape(1, 2).run(save, tmp_path)
    assert first == [".metadata", "__0_0.distcp", "rest.pt"]
    assert second == ["__1_0.distcp"]
    newest = checkpoint_path(tmp_path, 2)
    manifest = json.loads(newest.with_suffix(".json").read_text())
    written = sorted(newest.iterdir())
    assert manifest["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    assert manifest["bytes"] == sum(file.stat().st_size for file in written)
    assert manifest["step"] == 2


def test_each_file_is_verified_by_one_process(tmp_path: Path) -> None:
    Shape(1, 2).run(save, tmp_path)
    newest, before = checkpoint_path(tmp_path, 2), checkpoint_path(tmp_path, 1)
    for shape in (Shape(1, 2), Shape(2, 1), Shape(has_group=True), Shape()):  # the mesh that wrote it, and others
        results = shape.run(load, tmp_path)
        assert [result for result, _ in results] == [(newest, [])] * shape.size
        verified = [name for _, names in results for name in names]
        assert sorted(verified) == [".metadata", "__0_0.distcp", "__1_0.distcp", "rest.pt"]
        assert max(len(names) for _, names in results) == 4 // shape.size

    for name in ("__0_0.distcp", "__1_0.distcp"):  # one verified by each process
        data = bytearray((newest / name).read_bytes())
        data[-1] ^= 1
        (newest / name).write_bytes(data)
    wrong = r"damaged \(checksum of __[01]_0\.distcp does not match its manifest\)"
    for (path, lines), _ in Shape(1, 2).run(load, tmp_path):
        assert path == before
        assert re.fullmatch(rf"step_0000002\.ckpt: {wrong}; the one before is used", lines[0])
    (before / "__1_0.distcp").unlink()
    for (path, lines), _ in Shape(1, 2).run(load, tmp_path):
        assert path is None
        assert "step_0000001.ckpt: damaged" in lines[1]
        assert "__1_0.distcp" in lines[1]


class AsynchronousRanks:
    """Ranks whose sums, as on a GPU, are not complete until they are read."""

    size, rank = 2, 0

    def __init__(self) -> None:
        self.num_read = 0

    def sum(self, value: torch.Tensor) -> "AsynchronousRanks":
        assert value.tolist() == [0.0]
        return self

    def item(self) -> float:
        self.num_read += 1
        return 0.0


def test_barrier_blocks_the_host() -> None:
    ranks: Any = AsynchronousRanks()
    Mesh(world=ranks).barrier()
    assert ranks.num_read == 1
