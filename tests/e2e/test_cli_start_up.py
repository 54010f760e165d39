"""Help and completion import nothing heavy."""

import subprocess
import sys

import pytest
from support.command_line import CommandLine

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
sys.argv = ["moebench", *{arguments!r}]
from moebench.__main__ import main
try:
    main()
except SystemExit as end:
    code = end.code
print([name for name in {heavy!r} if name in sys.modules], code or 0)
"""


@pytest.mark.parametrize(
    "arguments",
    ["--help", "run --help", "compare --help", "curve --help", "probe --help", "bench layer --help", "--version"],
)
def test_help_imports_nothing_heavy(cli: CommandLine, arguments: str) -> None:
    code = ASK.format(arguments=arguments.split(), heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    "command",
    ["run", "compare", "curve", "scaling", "calibrate", "plan", "list", "show", "probe", "ui", "sync", "bench"],
)
def test_every_command_has_help(cli: CommandLine, command: str) -> None:
    ended = cli(command, "--help")
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
