"""Parents that are models of transformers in local folders, or that `moebench export` wrote."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import UsageError
from moebench.experts.bank import is_sharded, local_shard
from moebench.init_config import InitConfig, Parent
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.pretrained.folder import PREFIX, open_pretrained
from moebench.pretrained.parent import ParentModel, read_parent
from moebench.pretrained.weights import INDEX
from moebench.tasks.sources import file_digest
from moebench.training.initial_weights.parent import ParentWeights

CONTENT = ("config.json", "tokenizer.json", "*.safetensors", INDEX)
"""Files that determine a model and its tokens; the index selects those of the weights."""


class FolderWeights(ParentWeights):
    """The weights of a folder; every process reads the tensors one at a time and keeps its part."""

    def __init__(self, parent: ParentModel) -> None:
        self.label = f"{PREFIX}{parent.folder.path}"
        self.settings = parent.settings
        self.routing = parent.routing
        self.weights = parent.weights
        self.shapes = {name: torch.Size(shape) for name, shape in parent.weights.shapes.items()}

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            value, local = self.weights[name], local_shard(target)
            if is_sharded(target):
                first = local.shape[0] * target.device_mesh.get_local_rank("expert")
                value = value[first : first + local.shape[0]]
            local.copy_(value)


def open_folder(parent: Parent) -> FolderWeights:
    """Open the weights of a folder; raise UsageError where it cannot be read as a model."""
    return FolderWeights(read_parent(open_pretrained(f"{PREFIX}{parent.name}", requires_experts=False)))


def digest_folders(init: InitConfig) -> str | None:
    """Return the SHA-256 (hex) of the content of the folders that a section names; None where it names none.

    Raises UsageError where there is no such folder.
    """
    digests = [_digest_folder(parent) for parent in init.parents if parent.kind == "hf"]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def _digest_folder(parent: Parent) -> str:
    path = Path(parent.name).expanduser()
    if not path.is_dir():
        raise UsageError(f"init.from: {parent} is no local folder; nothing is downloaded")
    files = sorted({file for pattern in CONTENT for file in path.glob(pattern)})
    contents = [(file.name, file_digest(file)) for file in files]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def require_same_folders(init: InitConfig, mesh: Mesh = SINGLE_PROCESS_MESH) -> None:
    """Raise UsageError where folders are not what `init.digest` was computed from; all processes call it."""
    if init.digest is None:
        return
    digest = mesh.broadcast_object(digest_folders(init) if mesh.is_first else None)
    if digest != init.digest:
        raise UsageError(
            f"init.digest: {init.digest} is not that of the content of init.from, {digest or 'which is no hf: folder'}"
            " (restore the folder, or leave init.digest out)"
        )
