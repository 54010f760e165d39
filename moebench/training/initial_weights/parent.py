"""Parents: where weights are taken from, with their names, shapes and settings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from typing_extensions import override

from moebench.errors import UsageError
from moebench.init_config import ID_LENGTH, Parent
from moebench.parallel.checkpoint import VerifiedCheckpointIO, find_damage, find_newest_valid
from moebench.parallel.manifest import Manifest, list_manifests, parse_step
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.parallel.safe_reader import read_metadata
from moebench.pretrained.decoders.decoder import RoutingRule
from moebench.runs.find_run import find_run
from moebench.runs.folder import RunFolder
from moebench.training.trained_model import STATE_DICT_PREFIX

PREFIX = f"state_dict.{STATE_DICT_PREFIX}"
"""Prefix of the names of a model's weights in the description of a checkpoint."""


class ParentWeights(Protocol):
    """The weights of a trained model, by the names of `Model.state_dict`."""

    label: str
    """Name for messages, such as `run ab12cd34ef56`."""
    settings: Mapping[str, Any]
    """Sections `task`, `model`, `layout` and `router` of its configuration, as plain data."""
    shapes: Mapping[str, torch.Size]
    routing: RoutingRule | None = None
    """How its routers compute, where any router that computes so may continue from them: it names no router itself."""

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place by the parent's names; of a DTensor the part on this process.

        All processes of the mesh call it, with the same names.
        """


class RunWeights(ParentWeights):
    """The weights of a checkpoint of a run."""

    def __init__(self, run_id: str, settings: Mapping[str, Any], checkpoint: Path, mesh: Mesh) -> None:
        self.label = f"run {run_id}"
        self.settings = settings
        self.checkpoint = checkpoint
        self.mesh = mesh
        self.shapes = {
            name.removeprefix(PREFIX): tensor.size
            for name, tensor in read_metadata(checkpoint).state_dict_metadata.items()
            if name.startswith(PREFIX) and isinstance(tensor, TensorStorageMetadata)
        }

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        named = {f"{STATE_DICT_PREFIX}{name}": value for name, value in targets.items()}
        try:
            VerifiedCheckpointIO(self.mesh).load_weights(named, self.checkpoint)
        except (ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"init.from: {self.checkpoint} cannot be read ({reason})") from error


def complete_run_id(run: str, results: Path | None) -> str:
    """Return the id of the run that begins with `run`; a full id is returned as it is.

    Raises UsageError unless exactly one run of the results folder has the beginning, or without such a folder.
    """
    if len(run) == ID_LENGTH:
        return run
    if results is None:
        raise UsageError(f"init.from: 'run:{run}' is not the id of a run (allowed: run: and all {ID_LENGTH} digits)")
    try:
        return find_run(results, run).path.name
    except UsageError as error:
        raise UsageError(f"init.from: {error}") from error


def open_run(parent: Parent, results: Path, mesh: Mesh = SINGLE_PROCESS_MESH) -> RunWeights:
    """Open the weights of a run that is done; all processes of the mesh call it.

    Raises UsageError for a run that is missing, not done, or whose weights are missing or damaged.
    """
    folder = RunFolder.of(results, complete_run_id(parent.name, results))
    if not folder.cell.exists():
        raise UsageError(f"init.from: there is no run {parent.name} in {results} (`moebench list runs`)")
    cell, state = folder.read_cell(), folder.state()
    if state != "done":
        raise UsageError(f"init.from: the run {cell['id']} ({cell['arm']}, seed {cell['seed']}) is {state}, not done")
    last_step = _find_last_step(cell)
    is_last = parent.step in (None, last_step)
    find = _find_last_checkpoint if is_last else _find_kept_weights
    return RunWeights(cell["id"], cell["config"], find(folder, parent.step or last_step, mesh), mesh)


def _find_last_step(cell: Mapping[str, Any]) -> int:
    train = cell["config"].get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    if not isinstance(steps, int):
        raise UsageError(f"init.from: the cell of the run {cell['id']} is damaged: it has no train.steps")
    return steps


def _check_cell(folder: RunFolder) -> Callable[[Manifest], str | None]:
    run_id = folder.path.absolute().name
    return lambda manifest: None if manifest.cell in (None, run_id) else f"it is of the cell {manifest.cell}"


def _find_last_checkpoint(folder: RunFolder, step: int, mesh: Mesh) -> Path:
    checkpoint, damaged = find_newest_valid(folder.checkpoints, mesh, _check_cell(folder))
    if checkpoint is None or parse_step(checkpoint) != step:
        reason = damaged[0].partition(";")[0] if damaged else f"there is no checkpoint of step {step}"
        raise UsageError(f"init.from: {folder.checkpoints}: {reason}")
    return checkpoint


def _find_kept_weights(folder: RunFolder, step: int, mesh: Mesh) -> Path:
    kept = {parse_step(path): path for path in list_manifests(folder.kept_weights)}
    if step not in kept:
        steps = ", ".join(map(str, sorted(kept))) or "none"
        name = folder.path.name
        raise UsageError(f"init.from: the run {name} has no weights of step {step} (kept by it: {steps}, and the last)")
    damage = next(filter(None, mesh.gather_objects(find_damage(kept[step], _check_cell(folder), mesh))), None)
    if damage:
        raise UsageError(f"init.from: {kept[step].with_suffix('.ckpt')}: {damage}")
    return kept[step].with_suffix(".ckpt")
