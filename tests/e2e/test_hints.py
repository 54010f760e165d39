"""Every command that a message recommends is one of this command line, reaches the same results folder, and works."""

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

from moebench import __main__ as program
from moebench.cli import app

# In back quotes, in brackets at the end of an error, and in the last lines of a run.
HINT = re.compile(r"`(moebench [^`]+)`|\((moebench [^()]+)\)|(?:next: |\|  |continue with: )(moebench [^|\n]+)")
RESULTS = "my results"
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def find_hints(text: str) -> list[list[str]]:
    """Return the words of each recommended command."""
    return [shlex.split(next(filter(None, groups))) for groups in HINT.findall(text)]


def parse(words: list[str]) -> Any:
    """Parse a command as the command line does; None for a bare name that only refers to a command."""
    if words[1:] == ["--help"]:
        return None
    name, *rest = words[1:]
    command = COMMANDS[name]
    needs_arguments = any(parameter.required for parameter in command.params)
    if not rest and (needs_arguments or name in ("run", "list")):
        return None
    return command.make_context(name, rest)


def require_usable(text: str, results: str = RESULTS) -> list[list[str]]:
    """Fail if a command in the text cannot be parsed or is for another results folder; return those that can be run."""
    usable = []
    for words in find_hints(text):
        context = parse(words)
        if context is not None:
            if "results" in context.params:
                assert Path(context.params["results"]) == Path(results), words
            usable.append(words)
    return usable


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process and return all that it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moebench", *arguments])
        program._run()
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def store(finished: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of trained runs, in a folder whose name needs quotes."""
    for name in ("results", "text", "tiny.yaml"):
        source, target = finished.folder / name, tmp_path / (RESULTS if name == "results" else name)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    monkeypatch.chdir(tmp_path)
    return tmp_path / RESULTS


def damage(store: Path) -> Iterator[str]:
    """Damage one file after another, yield its name."""
    folders = Results(store).folders()
    for folder, name in zip(folders, ("cell.json", "result.json", "journal.jsonl", "load.jsonl"), strict=False):
        (folder / name).write_text('{"damaged": 1}\n')
        yield name
    (store / "experiments" / "tiny.json").write_text("{}")
    yield "record"
    (store / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    yield "database"


@pytest.mark.slow
def test_the_end_of_a_run(warm: WarmCommandLine, cli: CommandLine) -> None:
    cli.write(grid={"router": ["dense"]}, seeds=[0], train={"steps": 2, "checkpoint_every": 2})
    ended = warm(cli, "run", "./tiny.yaml", "train.log_every=2", "--results", RESULTS, "--tracker", "http://[::1]:9")
    hints = require_usable(ended.err)
    assert {words[1] for words in hints} == {"sync", "compare"}, ended.err
    sync = next(words for words in hints if words[1] == "sync")
    assert sync[-4:] == ["--tracker", "http://[::1]:9", "--results", RESULTS]
    (compare,) = [words for words in hints if words[1] == "compare"]
    assert warm(cli, *compare[1:]).code == 0
    again = warm(cli, "run", "./tiny.yaml", "train.log_every=2", "--results", RESULTS)
    assert {words[1] for words in require_usable(again.err)} >= {"compare", "ui"}, again.err


def test_an_interrupted_run(call: Callable[..., str], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebench.experiment import runner

    interrupted = runner.Interrupted(2, (), time.monotonic(), is_repeated=False)
    monkeypatch.setattr(runner._GridRun, "train", lambda self, options: ([], interrupted))
    text = call("run", "./tiny.yaml", "seeds=[0, 7]", "--results", RESULTS, "--tracker", "none", "--jobs", "2")
    (words,) = require_usable(text)
    assert words[1:] == [*shlex.split(f"run ./tiny.yaml 'seeds=[0, 7]' --results '{RESULTS}' --tracker none --jobs 2")]
    assert "interrupted" in call(*words[1:])


@pytest.mark.slow
def test_stores_that_are_missing_or_damaged(call: Callable[..., str], store: Path) -> None:
    (store / "runs").rename(store / "kept")
    text = "".join(call(*words, "--results", RESULTS) for words in (*READERS, ("ui",)) if words != ("sync",))
    (store / "kept").rename(store / "runs")
    names = [*damage(store)]
    text += "".join(call(*words, "--results", RESULTS) for words in (*READERS, ("ui",)))
    assert len(names) == 6
    hints = require_usable(text)
    assert {words[1] for words in hints} >= {"sync", "rm"}, text
    (store / "mlflow.db").unlink()
    for words in {tuple(words) for words in hints}:
        if words[1] == "rm":
            assert "removed" in call(*words[1:], "--yes")
        if words[1] == "sync":
            assert "sent to sqlite" in call(*words[1:])


READERS = (
    ("compare", "./tiny.yaml"),
    ("curve", "./tiny.yaml", "capacity=1,2"),
    ("probe", "./tiny.yaml"),
    ("show", "labels", "switch"),
    ("verify",),
    ("sync",),
    ("list", "experiments", "--bad"),
    ("list", "routers"),
    ("rm", "nobody", "--yes"),
    ("plan", "./tiny.yaml"),
    ("run", "./tiny.yaml", "--dry-run"),
)


def test_every_message_of_the_sources_names_commands_that_exist() -> None:
    """Texts that no test above prints: the names of their commands and options."""
    for file in (Path(program.__file__).parent).rglob("*.py"):
        for name in re.findall(r"`moebench ([a-z]+)", file.read_text()):
            assert name in COMMANDS, f"{file}: moebench {name}"


def test_json_of_a_finding_has_the_same_commands(call: Callable[..., str], store: Path) -> None:
    [*damage(store)]
    findings = json.loads(call("verify", "--json", "--results", RESULTS))["findings"]
    assert require_usable(" ".join(finding["remedy"] for finding in findings))
