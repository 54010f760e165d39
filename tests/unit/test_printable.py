import ast
import io
import json
import re
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.text import Text
from support.command_line import CommandLine, WarmCommandLine

import moebench
from moebench.printable import format_json, make_printable
from moebench.reporting.console import SafeConsole

PACKAGE = Path(moebench.__file__).parent
ESCAPES = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e\udcff"
"""Set the title of the window, clear it, overwrite the line, colour, reverse; a byte that is not UTF-8."""
SHOWN = r"\x1b]0;title\x07\x1b[2J\x0d\x9b31m\u202e\udcff"
IN_CONSOLE = SHOWN.replace(r"\x07", "").replace(r"\x0d", "")
"""Rich removes these itself."""
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAY_PRINT = {
    "printable.py",
    "training/train.py",  # to the log of the run
    "tracking/tracker_process.py",  # JSON with escapes, to the runner
    "launch/rendezvous.py",  # numbers
}


def test_control_characters_are_shown() -> None:
    assert make_printable(ESCAPES) == SHOWN
    assert make_printable("a\tb\nc ü 漢 👩‍🔬 \u200f") == "a\tb\nc ü 漢 👩‍🔬 \u200f"


def test_json_has_the_same_value_and_no_control_characters() -> None:
    text = format_json({ESCAPES: [ESCAPES, "ü"]})
    assert json.loads(text) == {ESCAPES: [ESCAPES, "ü"]}
    assert not OBEYED.search(text)
    assert "ü" in text


def test_a_console_obeys_its_own_styles_alone() -> None:
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, color_system="standard", width=200, legacy_windows=False)
    console.print(Text(ESCAPES, style="red"))
    assert stream.getvalue() == f"\x1b[31m{IN_CONSOLE}\x1b[0m\n"
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(ESCAPES)
    assert IN_CONSOLE in stream.getvalue()
    assert "\x1b]0" not in stream.getvalue()


def test_every_text_is_printed_by_the_safe_functions() -> None:
    others = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name, text = file.relative_to(PACKAGE).as_posix(), file.read_text()
        if "print" not in text and "Console" not in text:
            continue  # parsing takes most of the time
        for node in ast.walk(ast.parse(text)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if (called == "print" and name not in MAY_PRINT) or called == "Console":
                others.append(f"{name}:{node.lineno} calls {called}")
    assert not others


@pytest.mark.parametrize(
    "arguments", [("plan", "./a.yaml"), ("plan", "./a.yaml", "--json"), ("plan", "./a.yaml", "router.\x1b[2J=1")]
)
def test_texts_of_an_experiment_are_shown(cli: CommandLine, warm: WarmCommandLine, arguments: tuple[str, ...]) -> None:
    hostile = ESCAPES.removesuffix("\udcff")
    arms = [{"label": name, "router": name} for name in ("dense", "switch")]
    arms[1]["label"] = hostile
    cli.write("a.yaml", question=hostile, grid={"arm": arms}, seeds=[0])
    ended = warm(cli, *arguments)
    assert not OBEYED.search(ended.out + ended.err)
    if arguments[-1] == "--json":
        assert ended.json["question"] == hostile
    elif ended.code == 0:
        assert IN_CONSOLE.removesuffix(r"\udcff") in ended.out
    else:
        assert ended.err.startswith(r"error: router.\x1b[2J: ")
        assert ended.err.count("\n") == 1


def test_texts_of_a_results_folder_are_shown(cli: CommandLine, warm: WarmCommandLine) -> None:
    folder = cli.folder / "results" / "runs" / "0123456789ab"
    folder.mkdir(parents=True)
    cell = {"id": "0123456789ab", "arm": ESCAPES, "seed": 0, "experiment": ESCAPES, "config": {}}
    (folder / "cell.json").write_text(json.dumps(cell))
    for arguments in (("list", "runs"), ("list", "runs", "--markdown"), ("list", "runs", "--json"), ("probe", "zz")):
        ended = warm(cli, *arguments)
        assert ended.code == (2 if arguments[0] == "probe" else 0)
        assert not OBEYED.search(ended.out + ended.err), arguments
