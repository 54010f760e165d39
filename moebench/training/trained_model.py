"""A trained model under other settings: the weights of a finished run with a changed configuration."""

import warnings
from pathlib import Path

from moebench.compatibility import check_cell
from moebench.config import apply_overrides, merge_settings, resolve, to_plain
from moebench.errors import UsageError
from moebench.models.storageless import build_without_storage
from moebench.parallel.checkpoint import VerifiedCheckpointIO, find_newest_valid
from moebench.parallel.manifest import parse_step
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig, ExperimentConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_model

EVALUATION_SECTIONS = ("layout", "router")
"""Sections of the configuration with settings that affect evaluation."""
TRAINING_ONLY_KEYS = ("layout.capacity_factor_train", "layout.expert_dropout", "layout.recompute")
STATE_DICT_PREFIX = "model."
"""Prefix of the names of a model's weights in a checkpoint."""


def apply_evaluation_settings(config: CellConfig, assignments: list[str]) -> CellConfig:
    """Return the configuration with `key=value` applied; raise UsageError for keys that do not affect evaluation."""
    for key in (assignment.partition("=")[0] for assignment in assignments):
        section, _, option = key.partition(".")
        is_fixed = option in ("", "name") or option.startswith("losses") or key in TRAINING_ONLY_KEYS
        if section not in EVALUATION_SECTIONS or is_fixed:
            raise UsageError(
                f"{key}: does not apply to the evaluation of a trained model (allowed: keys of layout and router that"
                " do not affect training alone, such as layout.capacity_factor_eval, layout.drop_order, router.top_k)"
            )
    _, settings = apply_overrides(ExperimentConfig(), assignments)
    config = resolve(merge_settings(to_plain(config), settings))
    check_cell(config)
    return config


def check_same_parameters(config: CellConfig, trained: CellConfig, task: Task, what: str) -> None:
    """Raise UsageError, naming `what` was changed, if a configuration has other parameters than the trained one."""
    with build_without_storage():
        changed, original = (build_model(cell, task, sized_as=trained).state_dict() for cell in (config, trained))
    if {name: value.shape for name, value in changed.items()} != {
        name: value.shape for name, value in original.items()
    }:
        raise UsageError(f"{what}: changes the parameters of the model, so the trained weights do not fit")


def load_trained_model(config: CellConfig, trained: CellConfig, task: Task, folder: RunFolder) -> Model:
    """Build the model of `config` with the weights of the newest checkpoint of the run that trained `trained`.

    Raises UsageError when no checkpoint can be read, and for a run that is done when its last one cannot. Warns where
    an earlier checkpoint of an unfinished run is used.
    """
    cell_id = folder.read_cell()["id"]
    checkpoint, damaged = find_newest_valid(
        folder.checkpoints,
        check=lambda manifest: None if manifest.cell in (None, cell_id) else f"it is of the cell {manifest.cell}",
    )
    is_last = checkpoint is not None and parse_step(checkpoint) == trained.train.steps
    if checkpoint is None or (not is_last and folder.state() == "done"):
        reason = damaged[0].partition(";")[0] if damaged else "no checkpoint there can be read"
        raise UsageError(f"{folder.checkpoints}: {reason}")
    for line in damaged:
        warnings.warn(f"{folder.checkpoints}: {line}", stacklevel=2)
    return load_weights(build_model(config, task, sized_as=trained), checkpoint)


def load_weights(model: Model, checkpoint: Path) -> Model:
    """Return the model with the weights of a checkpoint; raise UsageError where they do not fit."""
    weights = model.state_dict()
    named = {f"{STATE_DICT_PREFIX}{name}": value for name, value in weights.items()}
    try:
        VerifiedCheckpointIO().load_weights(named, checkpoint)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{checkpoint}: does not fit the model of its cell ({reason})") from error
    model.load_state_dict(weights)
    return model
