"""A trained model under other settings: the weights of a finished run behind a changed configuration."""

from pathlib import Path

import torch

from moebench.compatibility import check_cell
from moebench.config import apply_overrides, merge_settings, resolve, to_plain
from moebench.errors import UsageError
from moebench.parallel.checkpoint import VerifiedCheckpointIO, find_newest_valid
from moebench.schema import CellConfig, ExperimentConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_model

SECTIONS = ("layout", "router")
"""Where the settings lie that a trained model can be evaluated with."""
TRAINING_ALONE = ("layout.capacity_factor_train", "layout.expert_dropout", "layout.recompute")
PREFIX = "model."
"""Of the names of a model's weights in a checkpoint."""


def changed(config: CellConfig, assignments: list[str]) -> CellConfig:
    """Return the configuration with `key=value` applied; raise UsageError for keys that no evaluation depends on."""
    for assignment in assignments:
        key = assignment.partition("=")[0]
        section, _, option = key.partition(".")
        if section not in SECTIONS or option in ("", "name") or option.startswith("losses") or key in TRAINING_ALONE:
            raise UsageError(
                f"{key}: is no setting of the evaluation of a trained model (allowed: keys of layout and router that"
                " are not of training alone, such as layout.capacity_factor_eval, layout.drop_order, router.top_k)"
            )
    _, values = apply_overrides(ExperimentConfig(), assignments)
    config = resolve(merge_settings(to_plain(config), values))
    check_cell(config)
    return config


def check_same_parameters(config: CellConfig, trained: CellConfig, task: Task, what: str) -> None:
    """Raise UsageError when a changed configuration has other parameters than the trained one; `what` changed it."""
    with torch.device("meta"):
        ours, theirs = (build_model(cell, task, sized_as=trained).state_dict() for cell in (config, trained))
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        raise UsageError(f"{what}: changes the parameters of the model, so no trained model has it")


def load_trained_model(config: CellConfig, trained: CellConfig, task: Task, checkpoints: Path) -> Model:
    """Return the model of `config` with the weights of the last checkpoint of the run that trained `trained`.

    Raises UsageError when there is no checkpoint that can be read.
    """
    checkpoint, _ = find_newest_valid(checkpoints)
    if checkpoint is None:
        raise UsageError(f"{checkpoints}: no checkpoint there can be read")
    model = build_model(config, task, sized_as=trained)
    weights = model.state_dict()
    VerifiedCheckpointIO().load_weights({f"{PREFIX}{name}": value for name, value in weights.items()}, checkpoint)
    model.load_state_dict(weights)
    return model
