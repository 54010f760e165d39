"""A parent whose training text has test documents of its child is refused; one division into splits has none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.parent_runs import PARENT, train_parent
from support.run_folders import write_cell, write_result
from support.tiny_experiment import tiny, write_text

from moebench.analysis.exported_run import ExportOptions, export_run
from moebench.analysis.trained_run import TrainedRun
from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.adaptation import AdaptOptions, build_adaptation
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parent_overlap import describe_training_text, require_no_overlap
from moebench.init_config import Parent
from moebench.runs.folder import RunFolder
from moebench.tasks.language import TextTask
from moebench.tasks.task import TASKS
from moebench.tasks.text.shared_documents import find_shared_documents, iterate_documents


def expand_stages(folder: Path, *, train: Path, adapt: Path, held_out: bool = False, **init: Any) -> Experiment:
    stages: list[dict[str, Any]] = [
        {"name": "train", "base": {"task": {"data": {"path": str(train)}}}},
        {"name": "adapt", "base": {"task": {"data": {"path": str(adapt)}}, "init": {"from": "stage:train", **init}}},
    ]
    if held_out:
        stages[0]["base"]["task"]["data"]["held_out_domains"] = ["b"]
        stages[1]["base"]["task"]["data"]["held_out_domains"] = ["a"]
    file = folder / "staged.yaml"
    file.write_text(yaml.safe_dump(tiny(stages=stages, grid={"router": ["dense"]}, seeds=[0])))
    return expand(file)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder of two domains, and one whose test split is the training documents of the first."""
    write_text(tmp_path / "text")
    for split in ("train", "validation", "test"):
        for number in range(3):
            source = tmp_path / "text" / "ab"[number % 2] / f"document{number if split != 'train' else number + 6}.txt"
            target = tmp_path / "copied" / split / "c" / f"{split}{number}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            words = source.read_text().split()
            target.write_text(" ".join(words if split != "train" else reversed(words)))
    return tmp_path / "text", tmp_path / "copied"


def test_domains_of_one_source_share_nothing(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    experiment = expand_stages(tmp_path, train=texts[0], adapt=texts[0], held_out=True)
    assert require_no_overlap(experiment.cells, ModelCosts(tmp_path)) == []


def test_test_documents_in_the_training_text_of_the_parent_are_refused(
    tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    experiment = expand_stages(tmp_path, train=texts[0], adapt=texts[1])
    with pytest.raises(UsageError, match=r"init.from: the training text of run:\w+ has \d of the 3 test documents of"):
        require_no_overlap(experiment.cells, ModelCosts(tmp_path))
    allowed = expand_stages(tmp_path, train=texts[0], adapt=texts[1], allow_overlap=True)
    (note,) = require_no_overlap(allowed.cells, ModelCosts(tmp_path))
    assert note.endswith("; init.allow_overlap allows it")
    assert [cell.id for cell in allowed.cells] == [cell.id for cell in experiment.cells]


@pytest.mark.parametrize(
    ("held_out", "note"),
    [
        ([], "run 000000000000 was trained on the target domain too: its gain is that of more training"),
        (["a"], "run 000000000000 was trained on the target domain too: its gain is that of more training"),
        (["b"], None),
    ],
)
def test_an_adaptation_to_a_domain_of_the_parent_has_a_note(
    held_out: list[str], note: str | None, tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    (cell,) = expand_stages(tmp_path, train=texts[0], adapt=texts[0]).cells
    config = to_plain(cell.parents[0].config)
    config["task"]["data"]["held_out_domains"] = held_out
    folder = tmp_path / "results" / "runs" / ("0" * 12)
    folder.mkdir(parents=True)
    write_cell(folder, config=config)
    write_result(folder, config=config)
    adaptation = build_adaptation(
        RunFolder.of(tmp_path / "results", folder.name), AdaptOptions(to="b"), [], [], tmp_path / "results"
    )
    assert [each.startswith(note) for each in adaptation.notes] == [True] if note else not adaptation.notes


def test_the_parents_of_parents_are_looked_at(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """The run that the parent started from was trained on the test text, the parent itself was not."""
    write_text(tmp_path / "other")
    for file in (tmp_path / "other").glob("*/*.txt"):
        file.write_text(" ".join(f"new{word}" for word in file.read_text().split()))
    (first,) = expand_stages(tmp_path, train=texts[0], adapt=tmp_path / "other").cells
    child = expand_stages(tmp_path, train=tmp_path / "other", adapt=texts[1]).cells[0]
    init = child.config.init.replace_parents([Parent.parse(f"run:{first.id}")])
    child = replace(child, config=replace(child.config, init=init))
    costs = ModelCosts(tmp_path)
    message = rf"training text of {first.config.init.from_} \(from which run:{first.id} started\) has \d of the 3 test"
    with pytest.raises(UsageError, match=message):
        require_no_overlap([replace(child, parents=(first,))], costs)  # both are stages of an experiment
    for cell in (first, *first.parents):
        RunFolder.of(tmp_path, cell.id).write_cell(cell.to_dict("staged"))
    with pytest.raises(UsageError, match=message):
        require_no_overlap([replace(child, parents=())], costs)
    RunFolder.of(tmp_path, first.parents[0].id).cell.unlink()
    (note,) = require_no_overlap([replace(child, parents=())], costs)
    assert note.startswith(f"init.from: what {first.config.init.from_} (from which run:{first.id} started) was trained")


def test_documents_are_read_back_from_their_tokens(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    (cell,) = expand_stages(tmp_path, train=texts[0], adapt=texts[1]).cells
    task = ModelCosts(tmp_path).task(cell.config)
    assert isinstance(task, TextTask)
    documents = [text for _, text in iterate_documents(task.text, task.text.test)]
    assert sorted(documents) == sorted(file.read_text() for file in (texts[1] / "test" / "c").glob("*.txt"))
    shared = find_shared_documents(task.text, task.text)
    assert (shared.documents, shared.num_shared) == (3, 0)


def test_an_exported_parent_is_described_by_its_configuration(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    run = train_parent(tmp_path, texts[0])
    digest = TASKS.get(run.config.task.name).item.source_digest(run.config.task)
    write_cell(run.folder, config=to_plain(run.config), arm="parent", data={"name": "text", "digest": digest})
    out = tmp_path / "out"
    export_run(TrainedRun.open(tmp_path, PARENT), ExportOptions(out=out, format="safetensors"), tmp_path)
    described = describe_training_text(Parent.parse(f"hf:{out}"))
    path = run.config.task.data.path  # type: ignore[attr-defined]
    assert described == f"hf:{out} was trained on task.data.path='{path}', as its config.json says, and is not compared"
