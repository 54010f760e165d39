"""Rewrite checkpoints as an attacker would: the manifest has the right checksums of the rewritten files."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex


class WritesMarker:
    """Writes an empty file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, ""))


def sign(checkpoint: Path) -> None:
    """Write the manifest anew, with the checksums of the files as they are now."""
    manifest = checkpoint.with_suffix(".json")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.iterdir() if file.is_file()}
    values = json.loads(manifest.read_text()) | {"sha256": sums}
    del values["checksum"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(values | {"checksum": digest}))


def edit_metadata(checkpoint: Path, edit: Callable[[Metadata, str], object]) -> None:
    """Call `edit` with the description of a checkpoint and the name of one of its weights; write and sign it."""
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata, next(name for name in metadata.state_dict_metadata if name.startswith("state_dict.")))
    file.write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


def store_object_as_weight(checkpoint: Path, marker: Path) -> None:
    """Declare a weight to be an object, which torch.distributed.checkpoint unpickles."""
    stream = io.BytesIO()
    torch.save(WritesMarker(marker), stream)
    (checkpoint / "object.bin").write_bytes(stream.getvalue())

    def edit(metadata: Metadata, weight: str) -> None:
        metadata.state_dict_metadata[weight] = BytesStorageMetadata()
        parts = {index: part for index, part in metadata.storage_data.items() if index.fqn != weight}
        metadata.storage_data = parts | {MetadataIndex(weight): _StorageInfo("object.bin", 0, len(stream.getvalue()))}

    edit_metadata(checkpoint, edit)


def store_object_as_tensor(checkpoint: Path, marker: Path) -> None:
    """Put an object where the description says that a tensor is."""
    stream = io.BytesIO()
    torch.save(WritesMarker(marker), stream)
    (checkpoint / "object.bin").write_bytes(stream.getvalue())

    def edit(metadata: Metadata, weight: str) -> None:
        for index in [index for index in metadata.storage_data if index.fqn == weight]:
            metadata.storage_data[index] = _StorageInfo("object.bin", 0, len(stream.getvalue()))

    edit_metadata(checkpoint, edit)


def pickle_metadata(checkpoint: Path, marker: Path) -> None:
    """Replace the description by a pickle that runs code."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(WritesMarker(marker)))
    sign(checkpoint)


def pickle_rest(checkpoint: Path, marker: Path) -> None:
    """Put an object into the file with everything that is not a tensor."""
    torch.save({"step": WritesMarker(marker)}, checkpoint / "rest.pt")
    sign(checkpoint)


ATTACKS = (store_object_as_weight, store_object_as_tensor, pickle_metadata)
"""Attacks that reading only the weights would meet."""
