"""Each process brings its own files of a checkpoint to the disk, and reads its share of one that is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from support.process_group import Mesh, Shape
from torch.distributed.tensor import DTensor, Replicate, Shard

import moebench.parallel.checkpoint as files
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_newest_valid


def read_by(mesh: Mesh, job: Any) -> tuple[Any, list[str]]:
    """Return what a job returns, and the files of which it made a checksum on this process."""
    seen: list[str] = []
    digest = files._digest

    def noted(file: Path) -> str:
        seen.append(file.name)
        return digest(file)

    files._digest = noted
    try:
        return job(), sorted(seen)
    finally:
        files._digest = digest


def content(mesh: Mesh) -> dict[str, Any]:
    """Return a checkpoint of which each process holds a part."""
    assert mesh.device_mesh is not None
    own = torch.full((2, 3), float(mesh.rank))
    spread = DTensor.from_local(own, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)
    return {"state_dict": {"w": spread, "b": torch.ones(4)}, "optimizer_states": [{"step.w": 3}]}


def save(mesh: Mesh, folder: Path) -> list[str]:
    for step in (1, 2):
        _, seen = read_by(
            mesh,
            lambda step=step: VerifiedCheckpointIO(mesh).save_checkpoint(content(mesh), checkpoint_path(folder, step)),
        )
    return seen


def load(mesh: Mesh, folder: Path) -> tuple[tuple[Path | None, list[str]], list[str]]:
    return read_by(mesh, lambda: find_newest_valid(folder, mesh))


def test_every_process_has_its_own_files(tmp_path: Path) -> None:
    first, second = Shape(1, 2).run(save, tmp_path)
    assert first == [".metadata", "__0_0.distcp", "rest.pt"]
    assert second == ["__1_0.distcp"]
    newest = checkpoint_path(tmp_path, 2)
    manifest = json.loads(newest.with_suffix(".json").read_text())
    written = sorted(newest.iterdir())
    assert manifest["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    assert manifest["bytes"] == sum(file.stat().st_size for file in written)
    assert manifest["step"] == 2


def test_the_files_are_checked_once_by_all_together(tmp_path: Path) -> None:
    Shape(1, 2).run(save, tmp_path)
    newest, before = checkpoint_path(tmp_path, 2), checkpoint_path(tmp_path, 1)
    for shape in (
        Shape(1, 2),
        Shape(2, 1),
        Shape(has_group=True),
        Shape(),
    ):  # by processes that wrote it, and by others
        found = shape.run(load, tmp_path)
        assert [result for result, _ in found] == [(newest, [])] * shape.size
        seen = [name for _, names in found for name in names]
        assert sorted(seen) == [".metadata", "__0_0.distcp", "__1_0.distcp", "rest.pt"]
        assert max(len(names) for _, names in found) == 4 // shape.size

    for name in ("__0_0.distcp", "__1_0.distcp"):  # in the share of one and of the other
        data = bytearray((newest / name).read_bytes())
        data[-1] ^= 1
        (newest / name).write_bytes(data)
    wrong = "checksum of __0_0.distcp, __1_0.distcp does not match its manifest"
    for result, _ in Shape(1, 2).run(load, tmp_path):
        assert result == (before, [f"step_0000002.ckpt: {wrong}; the one before is used"])
    (before / "__1_0.distcp").unlink()
    for (path, lines), _ in Shape(1, 2).run(load, tmp_path):
        assert path is None
        assert "step_0000001.ckpt: not readable" in lines[1]
        assert "__1_0.distcp" in lines[1]


class Queued:
    """Ranks whose sums are only asked for, as those of a GPU, until they are read."""

    size, rank = 2, 0

    def __init__(self) -> None:
        self.num_read = 0

    def sum(self, value: torch.Tensor) -> "Queued":
        assert value.tolist() == [0.0]
        return self

    def item(self) -> float:
        self.num_read += 1
        return 0.0


def test_waiting_holds_the_host() -> None:
    ranks: Any = Queued()
    Mesh(world=ranks).barrier()
    assert ranks.num_read == 1
