"""The program behind `WarmCommandLine`: it imports once and runs each call of its standard input in a fork.

It is run as text (`python -c`), so that workers do not import it as their main module.
"""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing.process
import os
import pkgutil
import runpy
import sys
import traceback
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from moebench.launch.local_worker import start_fork_server
from moebench.registry import HOMES, get_registry


def load_everything() -> None:
    """Import what calls need, while the server that forks their workers does the same."""
    start_fork_server()
    import moebench.cli

    for module in pkgutil.walk_packages(moebench.__path__, "moebench."):
        if not module.name.endswith("__main__") and not {"gpu", "peers"} & {*module.name.split(".")}:
            importlib.import_module(module.name)
    for kind in HOMES:
        get_registry(kind).names()
    # The first command imports what the library of the command line loads when it is needed: half of a call's time.
    with contextlib.redirect_stdout(io.StringIO()):
        moebench.cli.app(["list", "tasks"], standalone_mode=False)
    gc.freeze()


def load_tracker() -> None:
    """Import MLflow, which takes seconds: before the first call that opens a database."""
    from moebench.tracking.quiet import silence_mlflow

    with silence_mlflow():
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")


def opens_database(call: dict[str, Any]) -> bool:
    """Return whether a call opens a database in its own process; `run` leaves that to another one."""
    has_database = Path(call["folder"], "results", "mlflow.db").exists()
    return call["arguments"][1:2] == ["sync"] or (call["arguments"][1:2] in (["rm"], ["verify"]) and has_database)


def redirect(call: dict[str, Any]) -> None:
    """Open the streams of a call: its terminal, or its files."""
    if "terminal" in call:
        os.setsid()  # the terminal becomes the controlling one when it is opened
        streams = [os.open(call["terminal"], os.O_RDWR)] * 3
    else:
        files = [os.open(call[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")]
        streams = [os.open(call["in"], os.O_RDONLY), *files]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)


def leave_out_figures() -> None:
    """Train without drawing: the figures of a tiny run take as long as its training."""
    from moebench.analysis.figures import Figures

    for method in ("draw_run_figures", "_draw_curves", "_write_report"):
        assert hasattr(Figures, method)
        setattr(Figures, method, lambda *arguments: None)


def run_call(call: dict[str, Any]) -> int:
    """Run a command of moebench or a program, and return its exit code."""
    from moebench.__main__ import main

    if not call["draws_figures"]:
        leave_out_figures()
    os.chdir(call["folder"])
    multiprocessing.process.ORIGINAL_DIR = call["folder"]  # where workers start
    redirect(call)
    os.environ.update(call["environment"])
    sys.argv = [*call["arguments"]]
    code = 0
    try:
        if sys.argv[0] == "moebench":
            main()
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0  # type: ignore[assignment]
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Print the processes of the server, then the exit code of each call."""
    load_everything()
    server = forkserver._forkserver
    # It would wait for a process that is not its child.
    server.ensure_running = forkserver.ensure_running = lambda: None
    print(json.dumps([os.getpid(), server._forkserver_pid, resource_tracker._resource_tracker._pid]), flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        if opens_database(call):
            load_tracker()
        child = os.fork()
        if not child:
            os._exit(run_call(call))  # taking torch down again costs a second
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
