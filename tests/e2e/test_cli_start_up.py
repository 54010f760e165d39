"""Help and completion import nothing heavy."""

import subprocess
import sys

import pytest
from support.command_line import CommandLine, WarmCommandLine

HEAVY = (
    "torch",
    "lightning",
    "mlflow",
    "datasets",
    "matplotlib",
    "scipy",
    "statsmodels",
    "pandas",
    "numpy",
    "transformers",
    "safetensors",
)
ASK = """
import sys
from moebench.__main__ import main
ended = []
for line in {lines!r}:
    sys.argv = ["moebench", *line.split()]
    try:
        main()
    except SystemExit as end:
        ended.append(end.code or 0)
print([name for name in {heavy!r} if name in sys.modules], ended)
"""
HELP = ["--help", "run --help", "compare --help", "curve --help", "probe --help", "bench layer --help", "--version"]


def test_help_imports_nothing_heavy(cli: CommandLine) -> None:
    """In one process: what one line imports is there after the others."""
    code = ASK.format(lines=HELP, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"[] {[0] * len(HELP)}"


@pytest.mark.parametrize(
    "command",
    ["run", "compare", "curve", "scaling", "calibrate", "plan", "list", "show", "probe", "ui", "sync", "bench"],
)
def test_every_command_has_help(cli: CommandLine, warm: WarmCommandLine, command: str) -> None:
    ended = warm(cli, command, "--help")
    assert ended.code == 0, ended.err
    assert f"moebench {command}" in ended.out
    assert ended.err == ""


def test_completion_of_names_imports_nothing_heavy(cli: CommandLine) -> None:
    code = (
        "import sys\n"
        "from moebench.cli.options import complete_component, complete_experiment_or_router as routers\n"
        f"print(routers('sw'), complete_component('every'), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "['switch'] ['every_n'] []", done.stderr
