"""What the command line does to its process first, so that the user's environment changes no run, and last.

Imports nothing.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn


def prepare_process() -> None:
    """Make this process, and those that it starts, independent of the working folder and the environment."""
    _leave_working_folder()
    _open_closed_streams()
    # Of a notebook, for example: torchmetrics imports matplotlib, which refuses an unknown backend.
    os.environ["MPLBACKEND"] = "Agg"
    _replace_missing_home()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in latin-1 has no en dash


def end_process(codes: Sequence[int]) -> None:
    """End this process with the first of the exit codes, and nothing if there is none: an error is on its way.

    Called as the last of the exit handlers. The interpreter would now delete every object and module, which takes a
    second where torch is loaded, and longer after Ctrl-C on a busy machine.
    """
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                stream.flush()
        os._exit(codes[0])


def _leave_working_folder() -> None:
    """Import no module from the working folder, where a random.py or queue.py would take the place of a library's.

    `python -m moebench` puts it first on the path, and child processes started by name do so too.
    """
    try:
        working_folder = os.getcwd()
    except OSError:  # it was deleted
        working_folder = ""
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", working_folder):
        del sys.path[0]
    package_folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if package_folder not in map(os.path.abspath, sys.path):  # not installed: found in the working folder
        sys.path.append(package_folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            path for path in (os.environ.get("PYTHONPATH"), package_folder) if path
        )
    os.environ["PYTHONSAFEPATH"] = "1"


def _replace_missing_home() -> None:
    """Give a user without a home folder, as in a container, one for the time of the command: libraries ask for it."""
    if os.path.expanduser("~") == "~":
        import atexit
        import shutil
        import tempfile

        os.environ["HOME"] = folder = tempfile.mkdtemp(prefix="moebench-home-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _open_closed_streams() -> None:
    """Open /dev/null in place of a standard stream that is closed: the next file would get its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


@contextlib.contextmanager
def refuse_silent_exit() -> Iterator[None]:
    """Let no code that a command imports, such as a plug-in, end the process by os._exit(0) as if all were done."""
    exit_now, main_process = os._exit, os.getpid()

    def exit_with_reason(status: int) -> NoReturn:
        if status == 0 and os.getpid() == main_process:  # a forked child ends as it likes
            caller = sys._getframe(1)
            location = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            os.write(2, f"error: os._exit(0) was called at {location}: the command was not completed\n".encode())
            status = 2
        exit_now(status)

    os._exit = exit_with_reason
    try:
        yield
    finally:
        os._exit = exit_now


@contextlib.contextmanager
def hide_main_module() -> Iterator[None]:
    """Keep worker processes from importing the calling script, which would run it again in each of them."""
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)
