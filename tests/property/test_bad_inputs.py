"""Bad configurations and hostile files: always one line and exit code 2, never a traceback, never endless."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moebench import __main__ as program
from moebench.compatibility import check_cell
from moebench.config import apply_overrides, merge_settings, nest, resolve, to_plain
from moebench.errors import UsageError
from moebench.runs.journal import read_journal
from moebench.schema import ExperimentConfig
from moebench.yaml_text import PlainScalar, parse_override, parse_yaml

CORPUS = Path(__file__).parents[1] / "corpus"
TINY = """
base: {task: {name: language, sequence_length: 32}, model: {d_model: 16, num_layers: 2, num_heads: 2, ffn_width: 128}}
grid: {router: [dense, switch]}
seeds: [0]
"""


def read_corpus(name: str) -> list[dict[str, str]]:
    cases: list[dict[str, str]] = json.loads((CORPUS / name).read_text())
    return cases


def list_keys(plain: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted key of every value of a configuration."""
    keys = []
    for name, value in plain.items():
        key = f"{prefix}{name}"
        keys += list_keys(value, f"{key}.") if isinstance(value, dict) and value else [key]
    return keys


KEYS = list_keys(to_plain(resolve({})))
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e400", "1e24", "9" * 400, "1.5", "0x7f", "-0")
TEXTS = ("", "null", "~", "true", "yes", "täglich", "\u200b", "a\0b", "x" * 5000, "$\\frac{$", "[/bold]", "../..")
NESTED = ("[]", "{}", "[1, [2]]", "{a: {b: 1}}", "[", "{a", "'")
VALUES = st.sampled_from((*NUMBERS, *TEXTS, *NESTED)) | st.text(max_size=20)
MISSPELLED = st.sampled_from(KEYS).map(lambda key: f"{key}x")


def require_one_line(error: UsageError) -> None:
    assert str(error)
    assert len(str(error).splitlines()) == 1, str(error)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan an experiment in this process, and return the line with which it is refused."""
    monkeypatch.chdir(tmp_path)

    def plan(text: str, *overrides: str) -> str:
        (tmp_path / "case.yaml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["moebench", "plan", "case.yaml", *overrides, "--results", "results"])
        code = program._run()
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return plan


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=ascii(case["override"])[:60], marks=() if number % 4 == 0 else pytest.mark.slow)
        for number, case in enumerate(read_corpus("overrides.json"))
    ],
)
def test_an_override_of_the_corpus(refused: Any, case: dict[str, str]) -> None:
    assert case["expected"] in refused(TINY, case["override"])


@pytest.mark.parametrize("case", read_corpus("experiments.json"), ids=lambda case: case["name"])
def test_an_experiment_file_of_the_corpus(refused: Any, case: dict[str, str]) -> None:
    assert case["expected"] in refused(case["text"])


@given(key=st.sampled_from(KEYS) | MISSPELLED, value=VALUES)
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(key: str, value: str) -> None:
    try:
        _, cell = apply_overrides(ExperimentConfig(), [f"{key}={value}"])
        check_cell(resolve(merge_settings(parse_yaml(TINY)["base"], cell)))
    except UsageError as error:
        require_one_line(error)


@given(
    key=st.sampled_from(KEYS),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.text(max_size=9).map(PlainScalar),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
)
def test_a_value_of_any_type_is_accepted_or_refused_in_one_line(key: str, value: Any) -> None:
    try:
        resolve(nest(key, value))
    except UsageError as error:
        require_one_line(error)


@given(text=st.text(max_size=200) | st.text("[]{}:,-&*!<>'\"| \n\tab01#?%@", max_size=200))
def test_any_text_is_yaml_or_an_error_of_yaml(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError, ValueError):
        parse_yaml(text)


@given(override=st.text(max_size=60) | st.text("[]{}:,=.'\"&*! ab01", max_size=60).map("train.steps=".__add__))
def test_any_override_is_read_or_refused_in_one_line(override: str) -> None:
    parse_override(override)
    try:
        apply_overrides(ExperimentConfig(), [override])
    except UsageError as error:
        require_one_line(error)


@given(content=st.binary(max_size=200) | st.text('{}[]":,step0metrics1time.e\n', max_size=200).map(str.encode))
def test_any_bytes_are_a_journal_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    file.write_bytes(content)
    try:
        read_journal(file)
    except UsageError as error:
        require_one_line(error)
