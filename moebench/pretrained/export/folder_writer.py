"""Write an exported folder: complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from moebench.errors import UsageError
from moebench.file_access import require_utf8
from moebench.pretrained.export.tensors import TensorEntry, TensorSource
from moebench.pretrained.weights import INDEX, SINGLE
from moebench.reporting.formatting import format_bytes

MAX_SHARD_BYTES = 4 * 2**30
"""Larger models are divided into several files."""
SPARE_BYTES = 16 * 2**20
"""For tokenizer, configuration and headers."""
WRITTEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", INDEX)
"""Files of an exported folder besides the weights."""


def require_output(out: Path, *, force: bool) -> None:
    """Raise UsageError for an output folder that cannot be written.

    A folder with files is refused; with `force` only one that has others than those that an export writes.
    """
    require_utf8(out, "--out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out}: is no folder; give the name of a new one")
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir())
    if names and not force:
        raise UsageError(f"--out {out}: is not empty ({names[0]}); give a new folder, or --force to replace it")
    other = next((name for name in names if name not in WRITTEN and not name.endswith(".safetensors")), None)
    if other:
        raise UsageError(f"--out {out}: has {other}, which no export wrote; --force replaces exported models only")


def write_folder(
    out: Path, texts: Mapping[str, str | bytes], source: TensorSource, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write texts and tensors to a folder beside `out`, and rename it; returns the files.

    Raises UsageError where the disk is too small. `out`: checked by `require_output`; what is there is replaced.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    entries = source.list_entries()
    needed = sum(entry.num_bytes for entry in entries) + sum(map(len, texts.values())) + SPARE_BYTES
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UsageError(f"--out {out}: needs {format_bytes(needed)}, and {format_bytes(free)} are free")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, text in texts.items():
            content = text if isinstance(text, bytes) else text.encode()
            (temporary / name).write_bytes(content)
        _write_tensors(temporary, entries, source, max_shard_bytes)
        temporary.chmod(0o755)  # mkdtemp and safetensors create private files
        for file in temporary.iterdir():
            file.chmod(0o644)
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(out.iterdir())


def _replace(temporary: Path, out: Path) -> None:
    if not (out.exists() and any(out.iterdir())):
        os.replace(temporary, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, old / out.name)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(folder: Path, entries: Sequence[TensorEntry], source: TensorSource, max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards, values = _divide(entries, max_shard_bytes), source.read()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {entry.name: next(values) for entry in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _divide(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Return the tensors of each file: in order, as many as fit, at least one."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
