"""Trivial baselines of an experiment: where they are stored, computed once, and read where the data are gone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.comparison_runs import make_result
from support.run_folders import write_cell, write_result
from support.training_cases import tiny_config, write_text

from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.store import record_experiment
from moebench.experiment.trivial_baselines import (
    BaselineSource,
    TrivialBaselines,
    find_baselines,
    record_baselines,
    summarise_baselines,
)
from moebench.runs.experiment_record import read_record
from moebench.runs.folder import RunFolder
from moebench.runs.trivial_baselines import BELOW_TRIVIAL, RECORD_KEY, EvaluationSet, StoredBaselines, is_below_trivial
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.language import Language
from moebench.training.model import prepare_task


@pytest.fixture
def source(tmp_path: Path) -> BaselineSource:
    """A finished run of a task on a small text."""
    config = tiny_config(write_text(tmp_path), task={"data": {"tokenizer": "bytes"}})
    task = prepare_task(config, tmp_path / "results")
    digests = {"data_digest": task.digest, "eval_digest": task.eval_digest}
    return BaselineSource(result=make_result("dense", 0, 2.0, config=to_plain(config), **digests), config=config)


def names(trivial: TrivialBaselines) -> list[str]:
    assert trivial.problem == ""
    return [baseline.name for baseline in trivial.baselines]


def test_they_are_computed_once(tmp_path: Path, source: BaselineSource, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    compute = Language.compute_baselines
    monkeypatch.setattr(
        Language, "compute_baselines", lambda self, split: computed.append(split) or compute(self, split)
    )
    first = find_baselines(source, tmp_path / "results", "test")
    assert "order-3 n-gram" in names(first)
    assert find_baselines(source, tmp_path / "results", "test") == first
    assert find_baselines(source, tmp_path / "results", "validation") != first
    assert computed == ["test", "validation"]


def test_the_cache_and_the_record_do_without_the_data(tmp_path: Path, source: BaselineSource) -> None:
    results = tmp_path / "results"
    cached = find_baselines(source, results, "test")
    (tmp_path / "text.jsonl").unlink()
    assert find_baselines(source, results, "test") == cached
    record = {RECORD_KEY: [_stored(source, cached).to_dict()]}
    shutil.rmtree(results / "cache")
    assert find_baselines(source, results, "test", record=json.loads(json.dumps(record))) == cached
    gone = find_baselines(source, results, "validation", record=record)
    assert (gone.baselines, "\n" in gone.problem) == ((), False)
    assert "text.jsonl" in gone.problem


def test_those_of_another_version_are_better_than_none(tmp_path: Path, source: BaselineSource) -> None:
    cached = find_baselines(source, tmp_path / "results", "test")
    stored = _stored(source, cached)
    older = replace(stored, evaluation=replace(stored.evaluation, format=-1))
    shutil.rmtree(tmp_path / "results" / "cache")
    (tmp_path / "text.jsonl").unlink()
    record = {RECORD_KEY: [older.to_dict()]}
    assert find_baselines(source, tmp_path / "results", "test", record=record) == cached


def _stored(source: BaselineSource, trivial: TrivialBaselines) -> StoredBaselines:
    return StoredBaselines(
        evaluation=EvaluationSet.of(source.result, "test", ()),
        metric="bits_per_byte",
        lower_is_better=True,
        baselines=trivial.baselines,
    )


def test_changed_data_are_not_those_of_the_run(tmp_path: Path, source: BaselineSource) -> None:
    other = replace(source, result=replace(source.result, data_digest="other"))
    assert find_baselines(other, tmp_path / "results", "test").problem == (
        "the data have changed since the runs were trained"
    )


def test_an_error_of_a_task_is_one_line(
    tmp_path: Path, source: BaselineSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Language, split: str) -> list[TrivialBaseline]:
        raise ZeroDivisionError("of\nsomething")

    monkeypatch.setattr(Language, "compute_baselines", fail)
    assert find_baselines(source, tmp_path / "results", "test").problem == "ZeroDivisionError: of something"


def test_a_task_without_baselines_has_none_and_no_problem(
    tmp_path: Path, source: BaselineSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Language, "compute_baselines")
    (tmp_path / "text.jsonl").unlink()
    assert find_baselines(source, tmp_path / "results", "test") == TrivialBaselines()


DAMAGE: dict[str, Any] = {
    "no list": 3,
    "no object": [3],
    "no split": [{"split": 3}],
    "text for a number": [{"values": {"bits_per_byte": "2"}}],
    "not finite": [{"values": {"bits_per_byte": float("inf")}}],
    "a long name": [{"name": "x" * 101}],
    "too many": [{"baselines": [{}] * 65}],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_computed_again(tmp_path: Path, source: BaselineSource, damage: Any) -> None:
    results = tmp_path / "results"
    cached = find_baselines(source, results, "test")
    entries = damage
    if isinstance(damage, list) and isinstance(damage[0], dict):
        good = _stored(source, cached).to_dict()
        inner = {key: value for key, value in damage[0].items() if key in ("values", "name")}
        good["baselines"][0] |= inner
        entries = [good | {key: value for key, value in damage[0].items() if key not in inner}]
    assert find_baselines(source, results, "test", record={RECORD_KEY: entries}) == cached


def test_the_record_keeps_them_when_it_is_written_again(
    tmp_path: Path, source: BaselineSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results, path = tmp_path / "results", tmp_path / "results" / "experiments" / "a.json"
    experiment = write_experiment(tmp_path / "a.yaml")
    record_experiment(results, experiment)
    record_baselines(path, source, results)
    entries = json.loads(path.read_text())[RECORD_KEY]
    assert [entry["split"] for entry in entries] == ["test", "validation"]
    record_experiment(results, experiment)
    assert json.loads(path.read_text())[RECORD_KEY] == entries


def test_what_another_runner_records_meanwhile_is_kept(
    tmp_path: Path, source: BaselineSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results, path = tmp_path / "results", tmp_path / "results" / "experiments" / "a.json"
    experiment = write_experiment(tmp_path / "a.yaml")
    record_experiment(results, experiment)
    record_baselines(
        path, source, results, on_compute=lambda: record_experiment(results, replace(experiment, question="later"))
    )
    record = read_record(path)
    assert record["question"] == "later"
    assert len(record[RECORD_KEY]) == 2


def write_experiment(file: Path, question: str = "?") -> Experiment:
    """Write an experiment on the small text in the folder of the test."""
    task = {
        "name": "language",
        "sequence_length": 8,
        "eval_windows": 2,
        "data": {"path": "text.jsonl", "tokenizer": "bytes"},
    }
    file.parent.mkdir(exist_ok=True)
    base = {"task": task, "train": {"steps": 2, "batch_size": 2}}
    file.write_text(json.dumps({"question": question, "base": base, "grid": {"router": ["dense"]}, "seeds": [0]}))
    return expand(file)


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    first, other = write_experiment(Path("one/tiny.yaml")), write_experiment(Path("two/tiny.yaml"), "another?")
    record_experiment(results, first)
    with pytest.raises(UsageError, match=r"two/tiny.yaml: results folder .* has results of '.*one/tiny.yaml'"):
        record_experiment(results, other)
    assert json.loads((results / "experiments" / "tiny.json").read_text())["question"] == "?"
    record_experiment(results, write_experiment(Path("one/tiny.yaml"), "edited"))  # the same file
    copy = write_experiment(Path("two/tiny.yaml"), "edited")
    record_experiment(results, copy)  # with the same content
    record_experiment(results, expand((tmp_path / "two/tiny.yaml").resolve()))  # the same file by another path
    Path("two/tiny.yaml").rename("tiny.yaml")
    record_experiment(results, write_experiment(Path("tiny.yaml"), "moved"))


def test_cells_are_found_where_the_data_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, results = write_text(tmp_path), tmp_path / "results"
    experiment = write_experiment(Path("tiny.yaml"))
    (cell,) = experiment.cells
    text.unlink()
    with pytest.raises(UsageError, match=r"text\.jsonl"):
        expand(Path("tiny.yaml"), finished_in=results)  # no run has these data
    RunFolder.of(results, cell.id).write_cell(cell.to_dict("tiny"))
    assert [each.id for each in expand(Path("tiny.yaml"), finished_in=results).cells] == [cell.id]
    with pytest.raises(UsageError, match=r"text\.jsonl"):
        expand(Path("tiny.yaml"), ["task.eval_windows=3"], finished_in=results)  # nothing was trained on these


def test_the_summary_has_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    results = tmp_path / "results"
    experiment = write_experiment(Path("tiny.yaml"))
    results.mkdir()
    record_experiment(results, experiment)
    assert summarise_baselines(experiment, results) == ("", ())  # nothing is finished
    (cell,) = experiment.cells
    task = prepare_task(cell.config, results)
    folder = results / "runs" / cell.id
    write_cell(folder, id=cell.id, arm="dense", config=to_plain(cell.config))
    common = {"arm": "dense", "data_digest": task.digest, "eval_digest": task.eval_digest}
    common["config"] = to_plain(cell.config)
    for value, mark in ((0.01, ""), (8.0, BELOW_TRIVIAL)):
        (folder / "result.json").unlink(missing_ok=True)
        write_result(folder, metrics={"bits_per_byte": value}, **common)
        assert summarise_baselines(experiment, results) == (mark, ())


def test_not_to_be_better_is_to_be_below() -> None:
    baselines = [
        TrivialBaseline(name="weak", meaning="", values={"x": 5.0}),
        TrivialBaseline(name="reference", meaning="", values={"x": 3.0}, is_reference=True),
    ]
    assert [is_below_trivial(mean, baselines, "x", lower_is_better=True) for mean in (2.9, 3.0, 3.1, None)] == [
        False,
        True,
        True,
        None,
    ]
    assert is_below_trivial(3.1, baselines, "x", lower_is_better=False) is False
    assert is_below_trivial(3.1, baselines, "y", lower_is_better=True) is None
    assert is_below_trivial(3.1, [], "x", lower_is_better=True) is None
