"""Weights that stay on the disk (`train.keep_checkpoints`): written in training, read to see how routing changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path, find_damage, remove_checkpoints_after
from moebench.parallel.manifest import Manifest, list_manifests, parse_step
from moebench.runs.folder import KEPT, RunFolder
from moebench.schema import TrainConfig

if TYPE_CHECKING:
    from moebench.training.module import CellModule


def save_kept_weights(trainer: Any, module: "CellModule", checkpoints: Path, cell_id: str | None) -> None:
    """Save the weights after the step that has just ended; all processes of the mesh call it."""
    weights: Mapping[str, Tensor] = trainer.strategy.lightning_module_state_dict()
    path = checkpoint_path(checkpoints / KEPT, trainer.global_step)
    VerifiedCheckpointIO(module.mesh).save_weights(weights, path, {"cell": cell_id})


def prepare_kept_weights(train: TrainConfig, checkpoints: Path, step: int) -> str | None:
    """Remove the weights of later steps than `step`, from which a run continues: they are written again.

    Returns a line on steps up to it without kept weights: when the run passed them, they were not requested.
    """
    remove_checkpoints_after(step, checkpoints / KEPT)
    kept = {parse_step(path) for path in list_manifests(checkpoints / KEPT)}
    passed = [str(kept_step) for kept_step in train.kept_steps if kept_step <= step and kept_step not in kept]
    if not passed:
        return None
    return f"train.keep_checkpoints: no weights of step {', '.join(passed)}: the run was past it already"


def list_kept_weights(folder: RunFolder) -> tuple[dict[int, Path], dict[Path, str]]:
    """Return step -> kept weights of a run with correct checksums, and what is wrong with the damaged ones."""
    cell_id = folder.path.absolute().name

    def check(manifest: Manifest) -> str | None:
        return None if manifest.cell in (None, cell_id) else f"they are of the cell {manifest.cell}"

    kept, damaged = {}, {}
    for path in list_manifests(folder.kept_weights):
        damage = find_damage(path, check)
        if damage:
            damaged[path.with_suffix(".ckpt")] = damage
        else:
            kept[parse_step(path)] = path.with_suffix(".ckpt")
    return kept, damaged
