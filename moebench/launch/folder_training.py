"""Train the cell that a run folder describes, in this process."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moebench.config import resolve, to_yaml
from moebench.parallel.mesh import open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.registry import load_plugin
from moebench.runs.environment import collect_environment
from moebench.runs.folder import RunFolder, write_atomically, write_json
from moebench.runs.recorder import RunRecorder
from moebench.runs.result import RunResult
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import select_device, train_cell


def train_from_folder(
    folder: RunFolder,
    results: Path,
    process_info: ProcessInfo,
    *,
    progress: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
    report_activity: Callable[[str], None] = lambda phase: None,
) -> RunResult | None:
    """Train a cell as one of its processes, from its newest checkpoint on; return None if it was asked to stop.

    Rank 0 holds the lock of the folder; it writes the result, and deletes that of an earlier attempt.
    """
    cell = folder.read_cell()
    is_first = process_info.rank == 0
    if is_first:
        folder.result.unlink(missing_ok=True)
    for plugin in cell["plugins"]:
        load_plugin(plugin)
    config = resolve(cell["config"])
    torch.set_num_threads(config.train.threads)
    if is_first:
        _record_environment(folder, config.train.threads)
        write_atomically(folder.path / "config.yaml", to_yaml(config))
    task = prepare_task(config, results)
    if process_info.has_group and process_info.num_nodes == 1:
        # By default gloo listens on the address that the machine's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    device = select_device(config.train, process_info)
    with (
        RunRecorder(folder if is_first else None) as recorder,
        open_mesh(config.parallel, process_info, device) as mesh,
    ):
        context = RunContext(
            recorder=recorder,
            checkpoints=folder.checkpoints,
            report_progress=progress,
            should_stop=should_stop,
            report_activity=report_activity,
        )
        result = train_cell(config, task, context, cell_id=cell["id"], arm=cell["arm"], mesh=mesh)
    if result is not None and is_first:
        write_json(folder.result, result.to_dict())
    return result


def _record_environment(folder: RunFolder, threads: int) -> None:
    try:
        write_json(folder.environment, collect_environment(threads))
    except Exception:  # the run does not depend on it
        traceback.print_exc()


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
