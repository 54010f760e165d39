import io
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hostile_checkpoint import ATTACKS, edit_metadata, pickle_rest, sign
from torch.distributed.checkpoint.metadata import Metadata

from moebench.errors import UsageError
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_newest_valid
from moebench.parallel.plain_pickle import PlainPickleError, read_plain_pickle
from moebench.parallel.safe_reader import read_metadata


def save(folder: Path) -> Path:
    """Save a small checkpoint and return its folder."""
    path = checkpoint_path(folder, 3)
    weights = torch.arange(6.0).reshape(2, 3)
    content = {"step": 3, "state_dict": {"w": weights}, "optimizer_states": [{"state.w": -weights}]}
    VerifiedCheckpointIO().save_checkpoint(content, path)
    return path


def load(path: Path) -> torch.Tensor:
    """Load the weights and everything else, as a resumed run does."""
    state = {"state_dict": {"w": torch.zeros(2, 3)}, "optimizer_states": [{"state.w": torch.zeros(2, 3)}]}
    VerifiedCheckpointIO().load_into(state, path)
    return state["state_dict"]["w"]


def test_the_description_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = save(tmp_path)
    read, expected = read_metadata(path), pickle.loads((path / ".metadata").read_bytes())
    assert read.state_dict_metadata == expected.state_dict_metadata
    assert read.storage_data == expected.storage_data
    assert torch.equal(load(path), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("attack", [*ATTACKS, pickle_rest])
def test_loading_a_checkpoint_runs_no_code(tmp_path: Path, attack: Callable[[Path, Path], None]) -> None:
    path, marker = save(tmp_path), tmp_path / "marker"
    attack(path, marker)
    assert find_newest_valid(tmp_path) == (path, []), "the checksums of the attacker are right"
    with pytest.raises(UsageError, match=r"step_0000003\.ckpt: refused") as error:
        load(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def outside(metadata: Metadata, weight: str) -> None:
    for index, part in metadata.storage_data.items():
        metadata.storage_data[index] = replace(part, relative_path=f"../other/{part.relative_path}")


def absolute(metadata: Metadata, weight: str) -> None:
    for index, part in metadata.storage_data.items():
        metadata.storage_data[index] = replace(part, relative_path="/dev/zero")


def transformed(metadata: Metadata, weight: str) -> None:
    for index, part in metadata.storage_data.items():
        metadata.storage_data[index] = replace(part, transform_descriptors=["stream.zstd"])


def too_long(metadata: Metadata, weight: str) -> None:
    for index, part in metadata.storage_data.items():
        metadata.storage_data[index] = replace(part, length=10**15)


def negative(metadata: Metadata, weight: str) -> None:
    for index, part in metadata.storage_data.items():
        metadata.storage_data[index] = replace(part, offset=-(10**6))


def huge_tensor(metadata: Metadata, weight: str) -> None:
    metadata.state_dict_metadata[weight].size = torch.Size([10**9, 10**9])


def huge_part(metadata: Metadata, weight: str) -> None:
    metadata.state_dict_metadata[weight].chunks[0].sizes = torch.Size([10**9, 3])


def no_part(metadata: Metadata, weight: str) -> None:
    metadata.state_dict_metadata[weight].chunks = []  # the weight would keep its initial values


def stored_nowhere(metadata: Metadata, weight: str) -> None:
    metadata.storage_data = {}


def with_an_object(metadata: Metadata, weight: str) -> None:
    metadata.state_dict_metadata = OrderedDict(metadata.state_dict_metadata)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (outside, "is not the name of a file in the checkpoint"),
        (absolute, "'/dev/zero', which is not the name"),
        (transformed, "stored in another form"),
        (too_long, "more than __0_0.distcp contains"),
        (negative, "in place of a number from 0 on"),
        (huge_tensor, "do not add up to its size"),
        (huge_part, "is outside of it"),
        (no_part, "do not add up to its size"),
        (stored_nowhere, "stored nowhere"),
        (with_an_object, "sets items of a Record"),
    ],
)
def test_a_description_of_anything_else_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = save(tmp_path)
    edit_metadata(path, edit)
    with pytest.raises(UsageError, match=message):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"not a pickle",
        b"\x80\x04h\x05.",  # what was never stored
        b"\x80\x04N\x8f.",  # an empty set
        b"\x80\x04r" + struct.pack("<I", 2**31 - 1) + b".",  # pickle would reserve 32 GB for this index
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # and 1 TB for these bytes
        pickle.dumps(io.BytesIO, protocol=0),
    ],
)
def test_what_is_no_description_is_refused(content: bytes) -> None:
    with pytest.raises(PlainPickleError):
        read_plain_pickle(content)


def test_keys_are_not_hashed() -> None:
    # Pairs of pairs of pairs, 60 deep, each the same object twice: pickle would take 2^60 steps to use it as a key.
    nested = b"".join(b"h%c\x86\x94" % n for n in range(60))
    ((key, value),) = read_plain_pickle(b"\x80\x04})\x94" + nested + b"K\x01s.")
    assert (len(key), value) == (2, 1)


@pytest.mark.parametrize("place", ["../../secret.bin", "/dev/zero", "link.bin", "pipe"])
def test_a_manifest_names_only_plain_files_of_its_checkpoint(tmp_path: Path, place: str) -> None:
    path = save(tmp_path / "checkpoints")
    (tmp_path / "secret.bin").write_bytes(b"secret")
    (path / "link.bin").symlink_to("/dev/zero")
    os.mkfifo(path / "pipe")
    manifest = path.with_suffix(".json")
    values = json.loads(manifest.read_text())
    del values["checksum"]  # as written by an earlier version
    values["sha256"][place] = values["sha256"].pop("rest.pt")
    manifest.write_text(json.dumps(values))
    checkpoint, damaged = find_newest_valid(path.parent)
    assert checkpoint is None
    assert "step_0000003.ckpt: damaged" in damaged[0]


def test_a_link_in_a_checkpoint_is_not_followed(tmp_path: Path) -> None:
    path = save(tmp_path)
    sign(path)
    (path / "rest.pt").rename(tmp_path / "elsewhere")
    (path / "rest.pt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        load(path)
