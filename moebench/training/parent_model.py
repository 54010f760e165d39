"""The model of a pretrained folder, with a task on which it can be evaluated or trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.models.storageless import build_without_storage
from moebench.pretrained.families import CONFIG
from moebench.pretrained.folder import open_pretrained
from moebench.pretrained.parent import ParentModel, read_parent
from moebench.registry import load_plugin
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_model, prepare_task

LANGUAGE = {"task": {"name": "language"}}


def load_pretrained(name: str, results: Path, plugins: Sequence[str | Path] = ()) -> tuple[Model, Task]:
    """Return the model of `hf:PATH` in evaluation mode, and its task, as `load_parent_model` does."""
    for plugin in plugins:
        load_plugin(str(plugin))
    model, task = load_parent_model(read_parent(open_pretrained(name, requires_experts=False)), results)
    return model.eval(), task


def load_parent_model(parent: ParentModel, results: Path) -> tuple[Model, Task]:
    """Return the model of a folder with its weights, and its task, prepared in the cache of a results folder.

    A model of transformers gets the task `language` on the embedded text. Raises UsageError where the weights do not
    fit the model that the configuration describes, and where the data of an exported run is not there any more.
    """
    config = describe_cell(parent)
    task = prepare_task(config, results)
    with build_without_storage():  # sizes that no file of this folder has would need any memory
        _require_same_shapes(build_model(config, task).state_dict(), parent)
    model = build_model(config, task)
    for name, value in model.state_dict().items():
        value.copy_(parent.weights[name])  # one at a time in memory
    return model, task


def describe_cell(parent: ParentModel) -> CellConfig:
    """Return the cell of a pretrained model: that of its run, or one with the settings of its configuration."""
    settings = merge_settings(LANGUAGE, parent.settings) if parent.cell is None else parent.cell
    try:
        return resolve(settings)
    except UsageError as error:
        raise UsageError(f"{parent.folder.path / CONFIG}: {error}") from error


def _require_same_shapes(state: Mapping[str, Tensor], parent: ParentModel) -> None:
    shapes = parent.weights.shapes
    for name in sorted({*state, *shapes}):
        expected, given = tuple(state[name].shape) if name in state else None, shapes.get(name)
        if expected != given:
            raise UsageError(
                f"{parent.folder.path}: the weight {name} has the shape {given or 'of none'}, and {CONFIG} gives"
                f" {expected or 'none'}"
            )
