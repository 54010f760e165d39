"""Values are read by the type of their key: in a file, on the command line and in a grid."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moebench.config import apply_overrides, load_experiment, resolve, to_yaml
from moebench.conversion import apply_values, convert
from moebench.errors import UsageError
from moebench.schema import CellConfig, ExperimentConfig
from moebench.yaml_text import PlainScalar, parse_override, parse_yaml

TRAPS = [
    *("007", "010", "0x1F", "0o17", "1_000", "1e3", "1.5", ".5", ".inf", ".nan", "1:30", "190:20:30", "2001-01-23"),
    *("on", "off", "yes", "no", "y", "N", "true", "False", "d #2", "a: b", "- a", "<<", "=", "!!int 5", "&a", "*a"),
    *("${oc.env:HOME}", "a${b}", "%x", "@x", "`x`", "a,b", "{a", "[a", "[a] b", "'a' 'b'", '"a" "b"', "|", ">", "?"),
    *(" a ", "a\nb", "\ta", "a\\b", "\\${x}", "é日本\U0001f9ff", "\x85", "\u2028", "\ufeff", "\x00", "\x7f", "a: b #c"),
]
"""Texts that YAML, or one of its parsers, reads as another type."""


def cell_of(*overrides: str, **raw: Any) -> CellConfig:
    """Resolve a cell from overrides."""
    _, values = apply_overrides(ExperimentConfig(), overrides)
    return resolve(raw | values)


def quote(text: str) -> str:
    """Write a text between quotes, as YAML does."""
    return str(yaml.safe_dump(text, default_style='"', width=math.inf)).rstrip("\n")


def round_trips(check: Any) -> Any:
    for text in (*TRAPS, "null", "~", "", "'a'", '"a"', "[a]", "{a: b}"):
        check = example(text)(check)
    return given(st.text(max_size=30))(check)


@round_trips
def test_any_text_survives_a_file(text: str) -> None:
    config = resolve({"task": {"data": {"path": text or None, "held_out_domains": [text]}}})
    assert resolve(parse_yaml(to_yaml(config))) == config


@round_trips
def test_any_text_survives_a_quoted_override(text: str) -> None:
    experiment, _ = apply_overrides(ExperimentConfig(), [f"question={quote(text)}", f"baseline={quote(text)}"])
    assert (experiment.question, experiment.baseline) == (text, text)
    cell = cell_of(f"task.data.held_out_domains=[{quote(text)}, {quote(text + '1')}]")
    assert cell.task.data.held_out_domains == [text, f"{text}1"]


@round_trips
def test_text_on_the_command_line_is_taken_literally(text: str) -> None:
    bare = text.strip()
    if text in ("null", "Null", "NULL", "~") or (bare and bare[0] == bare[-1] and bare[0] in "'\""):
        return  # null, and texts in quotes, are the two exceptions
    experiment, _ = apply_overrides(ExperimentConfig(), [f"question={text}", f"baseline={text}"])
    assert (experiment.question, experiment.baseline) == (text, text)


def is_plain(text: str) -> bool:
    """Return whether YAML reads a scalar of just this text without quotes: no comment, list or anchor."""
    try:
        node = yaml.compose(f"question: {text}\n").value[0][1]
    except yaml.YAMLError:
        return False
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value == text


@pytest.mark.parametrize("text", [*filter(is_plain, TRAPS)])
def test_unquoted_text_in_a_file_is_taken_literally(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.yaml").write_text(f"question: {text}\nbase:\n  task:\n    data:\n      path: {text}\n")
    experiment, _ = load_experiment(tmp_path / "e.yaml")
    assert experiment.question == text
    assert resolve(experiment.base).task.data.path == text


NUMBERS: dict[str, tuple[int | None, float | None]] = {
    # As a whole number and as a number; None: refused.
    "12": (12, 12.0),
    "-3": (-3, -3.0),
    "+3": (3, 3.0),
    "010": (10, 10.0),
    "0x1F": (31, None),
    "0o17": (15, None),
    "1e3": (None, 1000.0),
    "1.0e-3": (None, 0.001),
    "2.5": (None, 2.5),
    ".5": (None, 0.5),
    "5.": (None, 5.0),
    ".inf": (None, math.inf),
    "-.inf": (None, -math.inf),
    "inf": (None, math.inf),
    "Infinity": (None, math.inf),
    "1e999": (None, math.inf),
    "9" * 400: (int("9" * 400), math.inf),
    "9" * 4001: (None, math.inf),
    "1_000": (None, None),
    "1:30": (None, None),
    "1,5": (None, None),
    "0b11": (None, None),
    "true": (None, None),
    "null": (None, None),
    "'5'": (None, None),
    "5 # five": (None, None),
    "[5]": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize(("text", "values"), NUMBERS.items(), ids=[text[:9] for text in NUMBERS])
def test_numbers_are_those_of_yaml_1_2(text: str, values: tuple[int | None, float | None]) -> None:
    for kind, value in zip((int, float), values, strict=True):
        for given_value in (parse_override(text), *([parse_yaml(text)] if "#" not in text else [])):
            if value is None:
                with pytest.raises(UsageError, match=r"^train\.x: .* was given\. Allowed: a (whole )?number"):
                    convert(given_value, kind, "train.x")
            else:
                value_read = convert(given_value, kind, "train.x")
                assert (type(value_read), value_read) == (kind, value)


def test_nan_is_a_number() -> None:
    for text in (".nan", ".NaN", "nan", "NaN"):
        assert math.isnan(convert(PlainScalar(text), float, "k"))


@pytest.mark.parametrize("text", ["on", "yes", "1", "0", "y", "null", "", "'true'", "tRue"])
def test_a_boolean_is_true_or_false(text: str) -> None:
    assert cell_of("allow_noncausal=True").allow_noncausal is True
    assert cell_of("allow_noncausal=false").allow_noncausal is False
    with pytest.raises(UsageError, match=r"^allow_noncausal: .* was given\. .*Allowed: true or false"):
        cell_of(f"allow_noncausal={text}")


def test_null_is_for_keys_that_may_be_null() -> None:
    for text in ("null", "Null", "~"):
        cell = cell_of(f"task.eval_windows={text}", f"task.data.domain_column={text}")
        assert (cell.task.eval_windows, cell.task.data.domain_column) == (None, None)
    assert cell_of('task.data.domain_column="null"').task.data.domain_column == "null"
    assert resolve(parse_yaml("task: {data: {domain_column: }}")).task.data.domain_column is None
    with pytest.raises(UsageError, match=r"^task\.data\.text_column: null was given\. Allowed: text"):
        cell_of("task.data.text_column=null")
    with pytest.raises(UsageError, match=r"^task\.data\.path: an empty name was given"):
        cell_of("task.data.path=")


def test_values_of_the_task_by_hand() -> None:
    cell = cell_of("task.data.path=d #2", "train.steps=010", "task.data.held_out_domains=[on, 007, 'a, b', 1:30]")
    assert cell.task.data.path == "d #2"
    assert cell.train.steps == 10
    assert cell.task.data.held_out_domains == ["on", "007", "a, b", "1:30"]
    losses = cell_of("router.losses={z: 1e-3, load_balance: 0}").router.losses
    assert losses == {"z": 0.001, "load_balance": 0.0}
    assert all(type(value) is float for value in losses.values())
    assert cell_of("task.data={path: x}", "train={steps: 7}").train.steps == 7
    assert cell_of("task.data.path={a: b}").task.data.path == "{a: b}"
    assert cell_of("task.data.path=yes").task.data.path == "yes"


def test_overrides_of_the_experiment() -> None:
    overrides = ["seeds=[3, 4]", "grid.train.steps=[1, 010]", "grid.router=[top_k, {name: top_k, top_k: 4}]"]
    experiment, cell = apply_overrides(ExperimentConfig(), [*overrides, "router=top_k", "router.top_k=3"])
    assert experiment.seeds == [3, 4]
    assert experiment.grid["train.steps"] == ["1", "010"]
    assert cell == {"router": {"name": "top_k", "top_k": "3"}}
    for override, line in {
        "seeds=[0, 1.5]": "seeds[1]: '1.5' was given. Allowed: a whole number",
        "seeds=0": "seeds: '0' was given. Allowed: a list, [a, b], each entry a whole number",
        "grid.router=top_k": "grid.router: 'top_k' was given. Allowed: a list, [a, b], each entry anything",
        "grid=5": "grid: '5' was given. Allowed: a mapping, {key: value}",
        "question=null": "question: null was given. Allowed: text",
    }.items():
        with pytest.raises(UsageError) as caught:
            apply_overrides(ExperimentConfig(), [override])
        assert str(caught.value) == line


@dataclass(frozen=True, kw_only=True)
class Entry:
    at: int
    width: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    name: str = "options"
    entries: list[Entry] = field(default_factory=list)
    either: int | str = 0
    level: Literal[1, 2, "on"] = 1
    free: Any = None
    texts: dict[str, str] = field(default_factory=dict)
    odd: set[int] = field(default_factory=set)


def test_options_of_every_kind() -> None:
    raw = parse_yaml("{entries: [{at: 1}, {at: 02, width: 3}], either: 1e3, level: on, free: [010, on, ~, 1.5, x]}")
    options = apply_values(Options(), {**raw, "texts": {"a": PlainScalar("007")}})
    assert options.entries == [Entry(at=1), Entry(at=2, width=3.0)]
    assert (options.either, options.level) == ("1e3", "on")
    assert options.free == [10, "on", None, 1.5, "x"]
    assert options.texts == {"a": "007"}
    assert apply_values(Options(), {"either": PlainScalar("7")}).either == 7
    assert apply_values(Options(), {"either": "7"}).either == "7"
    assert apply_values(Options(), {"level": PlainScalar("2")}).level == 2
    for raw, line in (
        ({"entries": [{}]}, "router.entries[0]: the key 'at' is missing"),
        ({"entries": [{"et": PlainScalar("1")}]}, "router.entries[0].et: router.entries[0] has no key 'et'."),
        ({"entries": [{"at": "1"}]}, "router.entries[0].at: '1' was given. Allowed: a whole number, without quotes"),
        ({"level": PlainScalar("3")}, "router.level: '3' was given. Allowed: 1, 2, on"),
        ({"odd": [1]}, "router.odd: options of type set[int] cannot be read from a configuration"),
        ({"nome": "x"}, "router.nome: router 'options' has no key 'nome'. Did you mean 'name'? Allowed: either,"),
    ):
        with pytest.raises(UsageError) as caught:
            apply_values(Options(), raw, "router")
        assert str(caught.value).startswith(line)


def test_a_long_value_is_truncated() -> None:
    with pytest.raises(UsageError) as caught:
        cell_of(f"train.steps={'x' * 20_000}")
    assert len(str(caught.value)) < 200


def test_anchors_and_merge_keys() -> None:
    text = """
base: &base {a: 1, b: 2}
other: {<<: *base, b: 3}
both: {<<: [{a: 5}, *base], c: "4"}
again: *base
"""
    values = parse_yaml(text)
    assert values["other"] == {"a": "1", "b": "3"}
    assert values["both"] == {"a": "5", "b": "2", "c": "4"}  # the first mapping wins
    assert values["again"] == {"a": "1", "b": "2"}
    assert isinstance(values["other"]["a"], PlainScalar)
    assert not isinstance(values["both"]["c"], PlainScalar)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n'a': 2\n", "found duplicate key 'a'"),
        ("a: {<<: {b: 1}, <<: {c: 1}}\n", "found duplicate key '<<'"),
        ("a: {<<: 5}\n", "'<<' needs a mapping"),
        ("? [a]\n: b\n", "a key that is not a scalar"),
        ("a: &x [*x]\n", "an anchor inside its own value"),
        ("a: !!python/object/apply:os.system ['touch hacked']\n", "python/object"),
        ("a: !!python/name:os.system\n", "python/name"),
        ("a: !!binary aGk=\n", "binary"),
        ("a: !mine 5\n", "!mine"),
        ("a: *gone\n", "undefined alias"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 1\n---\nb: 2\n", "single document"),
    ],
)
def test_malformed_yaml_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_experiment(tmp_path / "e.yaml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'e.yaml'}: not readable as YAML: ")
    assert problem in message
    assert "\n" not in message


def test_tags_of_json_types_leave_the_type_to_the_key() -> None:
    values = parse_yaml("{a: !!int 7, b: !!str 7, c: ! 7, d: !!null ''}")
    assert values == {"a": "7", "b": "7", "c": "7", "d": ""}
    assert {key for key, value in values.items() if isinstance(value, PlainScalar)} == {"a", "d"}
