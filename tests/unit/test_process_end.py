"""How the process of a command ends: at once, with its output written and its exit code."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import CommandLine
from typing_extensions import override

from moebench import __main__ as program

PROGRAM = """
import atexit
from moebench import __main__ as program

class Slow:
    def __del__(self):
        print("deleted by the interpreter")

program.kept = Slow()

def run():
    atexit.register(print, "handlers run")
    print("written", end="; ")
    return CODE

program._run = run
program.main()
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_ends_after_its_exit_handlers_and_deletes_no_objects(tmp_path: Path, code: int) -> None:
    command = [sys.executable, "-c", PROGRAM.replace("CODE", str(code))]
    ended = subprocess.run(command, env=CommandLine(tmp_path).environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "written; handlers run\n", "")


class FullStream(io.StringIO):
    """A stream to a file on a disk without room."""

    @override
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("arguments", [["list", "layouts", "--json"], ["list", "layouts"], ["--version"]])
def test_a_full_disk_below_standard_output_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moebench", *arguments])
    monkeypatch.setattr(sys, "stdout", FullStream())
    assert program._run() == 2
    assert capsys.readouterr().err == "error: output: No space left on device\n"


SWALLOWING = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    print("swallowed")
"""
TWICE = """
import os, signal
from moebench import interrupts
interrupts.record_interrupts()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("first", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("second")
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [("from moebench import interrupts\ninterrupts.record_interrupts()\nimport swallowing", ""), (TWICE, "first\n")],
)
def test_ctrl_c_in_an_import_and_a_second_one_end_the_process_at_once(tmp_path: Path, code: str, expected: str) -> None:
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    command, environment = [sys.executable, "-c", code], CommandLine(tmp_path).environment
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, expected, "")
