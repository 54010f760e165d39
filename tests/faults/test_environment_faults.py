"""The environment of the process: folders, locale, streams and other people's files change no run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command_line import ROOT, CommandLine, CommandResult, WarmCommandLine
from support.results_folder import Results, deterministic_points

WITHOUT_HOME = """
import pwd
def refuse(*arguments):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = refuse
"""
"""A sitecustomize that hides the user from the system, as in a container with an unknown user id."""


def write_small(cli: CommandLine, **changes: Any) -> None:
    cli.write(**{"grid": {"router": ["switch"]}, "seeds": [0], "baseline": "switch", "train": {"steps": 6}} | changes)


def run_with(cli: CommandLine, environment: dict[str, str | None], *arguments: str, **options: Any) -> CommandResult:
    """Call `run`, with the tracker, in a changed environment; None takes a variable away."""
    changed = {key: value for key, value in (cli.environment | environment).items() if value is not None}
    return cli.wait(cli.start("run", "./tiny.yaml", *arguments, env=changed, **options), timeout=150)


def assert_done(cli: CommandLine, ended: CommandResult) -> None:
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert set(Results(cli.folder / "results").statuses().values()) == {"done"}
    cli.assert_no_process_is_left()


@pytest.mark.slow
def test_a_long_temporary_folder(cli: CommandLine) -> None:
    write_small(cli)
    folder = cli.folder / ("x" * 130)
    folder.mkdir()
    assert_done(cli, run_with(cli, {"TMPDIR": str(folder)}))


@pytest.mark.slow
def test_files_of_the_working_folder_are_not_imported(cli: CommandLine) -> None:
    write_small(cli)
    for name in ("random", "queue", "mlflow", "torch", "secrets"):
        (cli.folder / f"{name}.py").write_text(f"raise RuntimeError('{name}.py was imported')")
    assert_done(cli, run_with(cli, {}))


@pytest.mark.slow
def test_settings_of_matplotlib_and_strange_labels(cli: CommandLine) -> None:
    labels = ["a{$b$", "top [/2]", r"$\\frac{$"]
    widths = dict(zip(labels, (8, 16, 24), strict=True))
    arms = [{"label": label, "router": "switch", "model.d_model": width} for label, width in widths.items()]
    cli.write(grid={"arm": arms}, seeds=[0], baseline=labels[0], train={"steps": 6})
    (cli.folder / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pgf\n")
    ended = run_with(cli, {"MPLBACKEND": "no such backend"}, "--tracker", "none")
    assert_done(cli, ended)
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning:")]
    assert all("trivial baselines" in line for line in warnings), warnings  # every figure was drawn
    assert len([*(cli.folder / "results").rglob("load.png")]) == 3


@pytest.mark.slow
def test_ascii_locale_and_output(cli: CommandLine) -> None:
    write_small(cli, question="Größer?")
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    assert_done(cli, run_with(cli, dict(locale), "--tracker", "none"))
    for form in ("--markdown", "--json"):
        command = [sys.executable, "-m", "moebench", "compare", "./tiny.yaml", form]
        environment = cli.environment | locale
        done = subprocess.run(command, cwd=cli.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nonexistent/home"])
def test_no_home_folder(cli: CommandLine, home: str | None) -> None:
    write_small(cli)
    site = cli.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT_HOME)
    before = {path.name for path in cli.folder.iterdir()} | {"results"}
    assert_done(cli, run_with(cli, {"HOME": home, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}))
    assert {path.name for path in cli.folder.iterdir()} == before  # no folder called ~


@pytest.mark.slow
def test_home_in_the_variable_and_colours_in_a_log(cli: CommandLine) -> None:
    write_small(cli)
    home = cli.folder / "home"
    environment = {"HOME": str(home), "MOEBENCH_RESULTS": "~/runs", "FORCE_COLOR": "1"}
    ended = run_with(cli, dict(environment), "--tracker", "none")
    assert ended.code == 0, ended.err
    assert (home / "runs" / "experiments" / "tiny.json").exists()
    assert not (cli.folder / "~").exists()
    assert len(ended.err.splitlines()) < 10, ended.err  # lines, no bars that move


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_ends(cli: CommandLine, stream: str) -> None:
    write_small(cli, seeds=[0, 1])
    reader, writer = os.pipe()
    os.close(reader)
    process = cli.start("run", "./tiny.yaml", "--tracker", "none", "--json", **{stream: writer})
    os.close(writer)
    ended = cli.wait(process, timeout=150)
    assert process.returncode == 0, ended.err
    assert len(Results(cli.folder / "results").statuses()) == 2


@pytest.mark.slow
def test_closed_streams(cli: CommandLine) -> None:
    write_small(cli)
    command = f"exec {sys.executable} -m moebench run ./tiny.yaml --tracker none <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=cli.folder, env=cli.environment, timeout=150)
    assert done.returncode == 0
    (folder,) = Results(cli.folder / "results").folders()
    assert deterministic_points(folder)[-1][0] == 6


@pytest.mark.parametrize("place", ["import", "config"])
def test_a_plugin_that_ends_the_process_is_a_failure(cli: CommandLine, warm: WarmCommandLine, place: str) -> None:
    write_small(cli)
    body = "import os\nos._exit(0)\n"
    if place == "config":
        body = "import os\nfrom moebench.routing.routers.switch import Switch\n"
        body += "Switch.__init__ = lambda *arguments, **options: os._exit(0)\n"
    (cli.folder / "leaving.py").write_text(body)
    ended = warm.train(cli, "--plugin", "leaving.py")
    assert ended.code == 2
    assert ended.err.startswith("error: os._exit(0) was called at ")
    assert "leaving.py:" in ended.err
    assert not [*Path(cli.folder).rglob("result.json")]
