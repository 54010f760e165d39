"""Reading checkpoints without executing code that their metadata might contain."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import override

ALLOWED_CLASSES = {
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
    "torch": {
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip
"""Globals that the metadata of a checkpoint may refer to, by module."""


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder whose metadata, a pickle, may refer to plain descriptions only.

    Raises UnpicklingError where the metadata refers to anything else.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as handle:
            metadata: Metadata = _Unpickler(handle).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name in ALLOWED_CLASSES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata must not refer to {module_name}.{global_name}")
