"""Train the cell that a run folder describes, in this process."""

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebench.config import resolve, to_yaml
from moebench.file_access import require_no_links
from moebench.launch.cell_check import list_version_changes, load_unchanged_plugins, require_unchanged_data
from moebench.parallel.mesh import open_mesh
from moebench.parallel.process_info import ProcessInfo
from moebench.runs.environment import collect_environment, describe_version
from moebench.runs.folder import RunFolder, write_atomically, write_json
from moebench.runs.recorder import RunRecorder
from moebench.runs.result import RunResult
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import select_device, train_cell


@dataclass(frozen=True, kw_only=True)
class TrainingReports:
    """What the owner of a training is told, and asked, while it runs."""

    progress: Callable[[dict[str, Any]], None]
    should_stop: Callable[[], bool]
    note: Callable[[str], None] = print
    activity: Callable[[str], None] = lambda phase: None


def train_from_folder(
    folder: RunFolder, results: Path, process_info: ProcessInfo, reports: TrainingReports
) -> RunResult | None:
    """Train a cell as one of its processes, from its newest checkpoint on; return None if it was asked to stop.

    Rank 0 holds the lock of the folder; it writes the result, and deletes that of an earlier attempt.
    """
    is_first = process_info.rank == 0
    if is_first:
        require_no_links(folder.path, is_deep=True)
    cell = folder.read_cell()
    load_unchanged_plugins(cell)
    config = resolve(cell["config"])
    require_unchanged_data(cell, config)
    torch.set_num_threads(config.train.threads)
    if is_first:
        folder.result.unlink(missing_ok=True)
        for note in list_version_changes(folder, cell):
            reports.note(note)
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
            results=results,
            report_progress=reports.progress,
            should_stop=reports.should_stop,
            report_note=reports.note,
            report_activity=reports.activity,
        )
        result = train_cell(config, task, context, cell_id=cell["id"], arm=cell["arm"], mesh=mesh)
    if result is None or not is_first:
        return result
    result = replace(result, records=folder.digest_records(), version=describe_version())
    folder.write_result(result)
    return result


def _record_environment(folder: RunFolder, threads: int) -> None:
    try:
        write_json(folder.environment, collect_environment(threads))
    except Exception:  # the run does not depend on it
        traceback.print_exc()


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
