import json
from pathlib import Path

import pytest
import yaml
from support.command_line import CommandLine, WarmCommandLine

from moebench.config import load_experiment, read_yaml
from moebench.errors import UsageError
from moebench.experiment.grid import expand
from moebench.experiment.store import record_experiment
from moebench.yaml_text import parse_yaml

BILLION = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
LONG_TEXT = f"a: &a {'x' * 5000}\nb: [{','.join(['*a'] * 3000)}]\n"
MERGED = "a: &a {k: [1, 2]}\n" + "b: [" + ",".join(["{<<: *a}"] * 20_000) + "]"


@pytest.mark.parametrize("text", [BILLION, LONG_TEXT, MERGED])
def test_aliases_that_stand_for_very_many_values_are_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="aliases stand for more than"):
        parse_yaml(text)


def test_ordinary_aliases_are_values_like_others() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: {c: *a, d: *a}") == {"a": ["1", "2"], "b": {"c": ["1", "2"], "d": ["1", "2"]}}


@pytest.mark.parametrize("text", [BILLION, "#" * (1 << 21)])
def test_a_command_refuses_them_in_one_line(cli: CommandLine, warm: WarmCommandLine, text: str) -> None:
    (cli.folder / "a.yaml").write_text(text)
    ended = warm(cli, "plan", "./a.yaml")
    assert ended.code == 2
    assert ended.err.startswith("error: a.yaml: not readable as YAML: ")
    assert ended.err.count("\n") == 1


def test_a_file_without_an_end_is_not_read_whole() -> None:
    with pytest.raises(UsageError, match="not readable as YAML"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "${env:SECRET}", "$SECRET", "${SECRET}", "%SECRET%", "${oc.decode:'1'}", "{{SECRET}}"]
)
def test_the_environment_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    file = tmp_path / "a.yaml"
    base = {"task": {"data": {"text_column": text}}}
    file.write_text(json.dumps({"question": text, "base": base, "grid": {"arm": [{"label": text, "router": "dense"}]}}))
    experiment = expand(file)
    assert experiment.question == text
    assert experiment.cells[0].arm == text
    record_experiment(tmp_path, experiment)
    assert "hunter2" not in (tmp_path / "experiments" / "a.json").read_text()
    assert "hunter2" not in str(experiment)
    assert load_experiment(file, [f"question={text}"])[0].question == text


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [true]", "!!python/name:os.system ''", "!x y"])
def test_tags_run_no_code(tag: str) -> None:
    with pytest.raises(yaml.YAMLError, match="is not allowed"):
        parse_yaml(f"a: {tag}")
