"""Before a cell is trained: what its id was computed from must be what this process has."""

from typing import Any

from moebench.errors import UsageError
from moebench.registry import load_plugin
from moebench.runs.environment import describe_version
from moebench.runs.folder import RunFolder, read_json
from moebench.schema import CellConfig
from moebench.tasks.contract import read_source_digest


def load_unchanged_plugins(cell: dict[str, Any]) -> None:
    """Import the plugins of a cell; raise UsageError if one is not the file that the cell's id was computed from."""
    digests = cell.get("plugin_digests") or [None] * len(cell["plugins"])
    for path, digest in zip(cell["plugins"], digests, strict=True):
        if digest not in (None, load_plugin(path).digest):
            raise UsageError(
                f"plugin {path}: was edited after this run was planned, so it no longer matches id {cell['id']};"
                " restore it, or start `moebench run` again"
            )


def require_unchanged_data(cell: dict[str, Any], config: CellConfig) -> None:
    """Raise UsageError if the data is not what the cell's id was computed from."""
    if read_source_digest(config.task) != cell["data"]["digest"]:
        raise UsageError(
            f"task {config.task.name}: its data was changed after this run was planned, so it no longer matches id"
            f" {cell['id']}; restore it, or start `moebench run` again"
        )


def list_version_changes(folder: RunFolder, cell: dict[str, Any]) -> list[str]:
    """Return a line for each way in which this moebench is another one than the runner's or that of earlier steps."""
    version = describe_version()
    notes = []
    if cell.get("version", version) != version:
        notes.append(f"the runner is moebench {cell['version']}, this process {version}")
    try:
        earlier = read_json(folder.environment).get("version", version) if folder.checkpointed_step >= 0 else version
    except UsageError:
        earlier = version  # missing or damaged: the run writes it again
    if earlier != version:
        notes.append(f"steps up to {folder.checkpointed_step} are by moebench {earlier}, later ones by {version}")
    return notes
