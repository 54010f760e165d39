"""Reading a checkpoint's table of contents without running what it might hold."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

PLAIN = {
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
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
}
"""What a table of contents is made of, by module."""
DTYPES = {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"}
"""The same of torch itself."""


class PlainReader(FileSystemReader):
    """Reads a checkpoint folder whose table of contents, a pickle, may hold plain descriptions and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the table of contents; raise UnpicklingError where it holds anything that could run."""
        with (Path(self.path) / ".metadata").open("rb") as handle:
            metadata: Metadata = _Unpickler(handle).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return one of the plain classes."""
        if global_name in PLAIN.get(module_name, ()) or (module_name == "torch" and global_name in DTYPES):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"a checkpoint's table of contents must not name {module_name}.{global_name}")
