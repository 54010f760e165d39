"""Load checkpoints that may come from strangers: tensors by name and offset, never an object or another file.

torch.distributed.checkpoint keeps the description of a checkpoint as a pickle, and loads what the description calls
bytes by unpickling it. Here the description is read as plain values, must describe tensors alone, and may refer only to
bytes that exist in the files of the checkpoint.
"""

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from typing_extensions import override

from moebench.errors import UsageError
from moebench.file_access import is_plain_name, open_member
from moebench.parallel.plain_pickle import Name, Pairs, Record, read_plain_pickle
from moebench.stored_values import require_count, require_name

METADATA = ".metadata"
MAX_METADATA_BYTES = 64 * 2**20
"""Larger descriptions are refused: 100,000 tensors need about 30 MB."""
DTYPES = frozenset(["bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"])
_MODULE = "torch.distributed.checkpoint.metadata."


class UnsafeCheckpointError(UsageError):
    """A checkpoint that is not loaded, because its description is not that of tensors in its own files."""


class SafeReader(FileSystemReader):
    """Reads the tensors of a checkpoint folder. Raises UnsafeCheckpointError where it describes anything else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = read_metadata(path)  # here, because torch would try again and print a traceback

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors only: torch's planner would unpickle everything else."""

    @override
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise UnsafeCheckpointError(f"'{read_item.dest_index.fqn}' is not a tensor: refused, loading it could run code")


def read_metadata(checkpoint: Path) -> Metadata:
    """Return the description of a checkpoint; raise UnsafeCheckpointError unless it describes tensors in its files."""
    try:
        with open_member(checkpoint, METADATA) as file:
            content = file.read(MAX_METADATA_BYTES + 1)
        if len(content) > MAX_METADATA_BYTES:
            raise ValueError(f"it has more than {MAX_METADATA_BYTES // 2**20} MiB")
        return _Description.parse(read_plain_pickle(content)).to_metadata(checkpoint)
    except (ValueError, TypeError, OSError) as error:
        raise UnsafeCheckpointError(
            f"{checkpoint}: refused, {METADATA} is not the description of a checkpoint of moebench: {error}; delete it"
            "  to continue without it"
        ) from error


def require_tensors(checkpoint: Path) -> None:
    """Read every part of a checkpoint, one at a time; raise what `torch.load` raises, and ValueError, for no tensor."""
    for index, part in read_metadata(checkpoint).storage_data.items():
        with open_member(checkpoint, part.relative_path) as file:
            file.seek(part.offset)
            content = io.BytesIO(file.read(part.length))
        value = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"'{index.fqn}' is stored as a {type(value).__name__} in place of a tensor")


@dataclass(frozen=True)
class _Description:
    """The tensors and where their parts are stored."""

    tensors: Mapping[str, TensorStorageMetadata]
    parts: Mapping[MetadataIndex, _StorageInfo]

    @classmethod
    def parse(cls, value: Any) -> "_Description":
        fields = _fields(value, f"{_MODULE}Metadata")
        tensors = {
            require_name(name): _parse_tensor(name, item) for name, item in _pairs(fields.get("state_dict_metadata"))
        }
        parts = dict(_parse_part(index, item) for index, item in _pairs(fields.get("storage_data")))
        return cls(tensors, parts)

    def to_metadata(self, checkpoint: Path) -> Metadata:
        """Return the description for torch; raise ValueError for parts that are missing or not in the files."""
        sizes = {name: _file_size(checkpoint, name) for name in {part.relative_path for part in self.parts.values()}}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                part = self.parts.get(MetadataIndex(name, chunk.offsets))
                if part is None:
                    raise ValueError(f"a part of '{name}' is stored nowhere")
                if part.offset + part.length > sizes[part.relative_path]:
                    raise ValueError(f"'{name}' has {part.length} bytes, more than {part.relative_path} contains")
        return Metadata(state_dict_metadata=dict(self.tensors), storage_data=dict(self.parts))


def _parse_tensor(name: str, value: Any) -> TensorStorageMetadata:
    """Return one tensor; raise ValueError for anything but a tensor, and where its parts do not add up to it."""
    fields = _fields(value, f"{_MODULE}TensorStorageMetadata", name)
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    module, _, dtype_name = dtype.text.rpartition(".") if isinstance(dtype, Name) else ("", "", "")
    if module != "torch" or dtype_name not in DTYPES:
        raise ValueError(f"'{name}' is of no known type of numbers")
    size = _size(fields.get("size"), name)
    chunks = [_parse_chunk(name, chunk) for chunk in _list(fields.get("chunks"))]
    for chunk in chunks:
        bounds = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if any(offset + length > total for offset, length, total in bounds):
            raise ValueError(f"a part of '{name}' is outside of it")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the parts of '{name}' do not add up to its size {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype_name)), size, chunks)


def _parse_chunk(name: str, value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, f"{_MODULE}ChunkStorageMetadata", name)
    return ChunkStorageMetadata(_size(fields.get("offsets"), name), _size(fields.get("sizes"), name))


def _parse_part(index: Any, value: Any) -> tuple[MetadataIndex, _StorageInfo]:
    fields = _fields(index, f"{_MODULE}MetadataIndex")
    name, offset = require_name(fields.get("fqn")), fields.get("offset")
    if offset is None:
        raise ValueError(f"'{name}' is not a tensor, and loading it could run code")
    place = _fields(value, "torch.distributed.checkpoint.filesystem._StorageInfo", name)
    file, start, length = require_name(place.get("relative_path")), place.get("offset"), place.get("length")
    if not is_plain_name(file):
        raise ValueError(f"'{name}' is stored in '{file}', which is not the name of a file in the checkpoint")
    if place.get("transform_descriptors"):
        raise ValueError(f"'{name}' is stored in another form")
    return MetadataIndex(name, _size(offset, name)), _StorageInfo(file, require_count(start), require_count(length))


def _file_size(folder: Path, name: str) -> int:
    with open_member(folder, name) as file:
        return os.fstat(file.fileno()).st_size


def _fields(value: Any, class_name: str, owner: str = "it") -> dict[str, Any]:
    """Return the state of a record of the class; raise ValueError for any other value."""
    name = value.name if isinstance(value, Record) else type(value).__name__
    if name == f"{_MODULE}BytesStorageMetadata":
        raise ValueError(f"'{owner}' is stored as an object in place of a tensor, and loading it could run code")
    if name != class_name:
        raise ValueError(f"'{owner}' is a {name.removeprefix(_MODULE)}, expected {class_name.removeprefix(_MODULE)}")
    return {require_name(key): item for key, item in _pairs(value.state)}


def _pairs(value: Any) -> Pairs:
    if type(value) is not Pairs:
        raise ValueError(f"it has a {type(value).__name__} in place of a mapping")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"it has a {type(value).__name__} in place of a list")
    return value


def _size(value: Any, owner: str) -> torch.Size:
    """Return a torch.Size; raise ValueError for another value and for negative numbers."""
    args = value.args if isinstance(value, Record) and value.name == "torch.Size" else None
    if not (isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], tuple)):
        raise ValueError(f"'{owner}' has no size")
    return torch.Size([require_count(number) for number in args[0]])
