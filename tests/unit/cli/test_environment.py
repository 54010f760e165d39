"""The environment variables that are known are those that the code reads."""

import re

import pytest
from support.command_line import ROOT

from moebench.cli.environment import VARIABLES, warn_of_unknown_variables


def test_every_variable_of_the_code_is_known() -> None:
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "moebench").rglob("*.py")]
    found = {name for text in texts for name in re.findall(r"MOEBENCH_[A-Z]+\b", text)}
    assert found - {"MOEBENCH_TEST"} == {*VARIABLES}


def test_an_unknown_variable_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MOEBENCH_FUZZ_EXAMPLES", raising=False)
    monkeypatch.setenv("MOEBENCH_TRACKR", "none")
    monkeypatch.setenv("MOEBENCH_TRACKER", "none")
    monkeypatch.setenv("MOEBENCH_TEST_DEVICE", "cpu")
    warn_of_unknown_variables()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: environment variable MOEBENCH_TRACKR is unknown and ignored. Did you mean 'MOEBENCH_TRACKER'?"
        " Known: MOEBENCH_KERNELS, MOEBENCH_RESULTS, MOEBENCH_TRACKER"
    ]
