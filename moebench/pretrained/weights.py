"""The safetensors files of a folder: which tensors they have, read from their headers alone."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import is_plain_name, read_plain_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights; integers and 8-bit floats are quantised ones, whose scales need other code."""
INTEGERS = ("I64", "I32", "U8", "BOOL")
"""Types of tables and counters of routers."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is stored."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16 ..."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of its values."""
        return prod(self.shape)


def read_weights(folder: Path, *, allows_integers: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a model by name; no value is read.

    Raises UsageError for pickled weights, a missing or damaged file, files that disagree with their index, and types
    that are not floating point. `allows_integers`: tables and counters of routers may be whole numbers.
    """
    allowed = (*FLOATS, *INTEGERS) if allows_integers else FLOATS
    files, listed = _list_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise UsageError(f"{file}: the tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    for name, file_name in listed.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UsageError(f"{folder / file_name}: lacks the tensor {name}, which {INDEX} lists there")
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed and not name.endswith(("_idx", "_ids", "num_batches_tracked")):
            raise UsageError(
                f"{tensor.file}: the tensor {name} has the type {tensor.dtype}; allowed: {', '.join(allowed)}, no"
                " quantised weights"
            )
    return tensors


def _list_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files of a model, and the file of each tensor where there is an index."""
    if (folder / INDEX).exists():
        listed = _read_index(folder / INDEX)
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(f"{folder}: {missing[0]}{more} of {len(names)} shards missing, which {INDEX} lists")
        return [folder / name for name in names], listed
    if (folder / SINGLE).exists():
        return [folder / SINGLE], {}
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise UsageError(
            f"{folder / pickled[0]}: not read, since loading it may run code; allowed: {SINGLE} (save_pretrained of"
            " transformers writes it)"
        )
    raise UsageError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _read_index(file: Path) -> dict[str, str]:
    try:
        listed = read_plain_json(file)["weight_map"]
        if not listed or not all(is_plain_name(name) for name in listed.values()):
            raise ValueError("weight_map has names that are no files of the folder")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{file}: cannot be read ({_describe(error)})") from error
    not_safe = next((name for name in listed.values() if not name.endswith(".safetensors")), None)
    if not_safe:
        raise UsageError(f"{file}: lists {not_safe}; allowed: files that end in .safetensors")
    return dict(listed)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would have no end
            raise OSError("is not a plain file")
        with safe_open(file, framework="pt") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}: is damaged or no safetensors file ({_describe(error)})") from error


def _describe(error: Exception) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text}".splitlines()[0]
