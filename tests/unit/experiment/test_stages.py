"""Stages of an experiment: which cells each has, which run a cell starts from, and which overrides reach a stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_experiment import tiny, write_text

from moebench.cli.run_summary import describe_failure
from moebench.errors import UsageError
from moebench.experiment.cells import list_ancestors
from moebench.experiment.dry_run import list_actions
from moebench.experiment.foreground import select_phase_cell
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.seed_plan import change_seed
from moebench.experiment.stage_runs import build_stage_experiments, list_earlier_cells, split_orphans, write_failures
from moebench.experiment.store import open_results, record_experiment
from moebench.experiment.tuning import list_tuning_cells
from moebench.runs.cell import Cell
from moebench.runs.experiment_record import find_served_experiment, read_record
from moebench.runs.folder import RunFolder

STAGES: list[dict[str, Any]] = [
    {"name": "train", "base": {"task": {"data": {"held_out_domains": ["b"]}}}},
    {"name": "adapt", "base": {"task": {"data": {"held_out_domains": ["a"]}}, "train": {"steps": 6}}},
]


@pytest.fixture
def expand_staged(tmp_path: Path) -> Any:
    write_text(tmp_path / "text")

    def build(*overrides: str, stages: Sequence[dict[str, Any]] = STAGES, **changes: Any) -> Experiment:
        settings = tiny(stages=list(stages), **{"grid": {"router": ["dense", "switch"]}, "baseline": None, **changes})
        settings["base"]["task"]["data"]["path"] = str(tmp_path / "text")
        file = tmp_path / "staged.yaml"
        file.write_text(yaml.safe_dump(settings))
        return expand(file, list(overrides))

    return build


def parent_of(cell: Cell) -> Cell:
    (parent,) = cell.parents
    return parent


def test_a_cell_starts_from_the_run_of_the_previous_stage_with_its_seed_and_labels(expand_staged: Any) -> None:
    experiment = expand_staged()
    assert experiment.stages == ("train", "adapt")
    assert [(cell.arm, cell.seed) for cell in experiment.cells] == [
        (arm, seed) for seed in (0, 1) for arm in ("dense", "switch")
    ]
    for cell in experiment.cells:
        parent = parent_of(cell)
        assert (parent.arm, parent.seed, parent.stage) == (cell.arm, cell.seed, "train")
        assert cell.config.init.from_ == f"run:{parent.id}"
        assert parent.config.init.from_ is None
        assert (parent.config.train.steps, cell.config.train.steps) == (12, 6)
    (stage,) = build_stage_experiments(experiment)
    assert (stage.name, stage.stage_of, stage.is_reported) == ("staged-train", "staged", False)
    assert [cell.id for cell in stage.cells] == [parent_of(cell).id for cell in experiment.cells]


def test_the_id_of_a_child_contains_that_of_its_parent(expand_staged: Any) -> None:
    before = expand_staged().cells[0]
    changed = expand_staged("stages.train.base.train.weight_decay=0.2").cells[0]
    assert changed.config.train == before.config.train
    assert changed.id != before.id
    unchanged = expand_staged("stages.train.base.train.log_every=3").cells[0]
    assert unchanged.id == before.id  # a cadence of logging is in no id


def test_an_axis_of_the_last_stage_shares_the_parent(expand_staged: Any) -> None:
    stages = [STAGES[0], STAGES[1] | {"grid": {"train.learning_rate": [1e-3, 2e-3]}}]
    experiment = expand_staged(stages=stages)
    assert len(experiment.cells) == 8
    assert len(list_earlier_cells(experiment)) == 4
    assert {len(cell.parents) for cell in experiment.cells} == {1}


def test_an_arm_can_start_from_scratch_from_a_named_run_or_from_an_earlier_stage(expand_staged: Any) -> None:
    arms = [
        {"label": "scratch", "init.from": None, "router": "switch"},
        {"label": "dense first", "init.from": "stage:first/dense", "router": "dense"},
        {"label": "second", "router": "dense"},
    ]
    stages = [
        {"name": "first", "grid": {"router": ["dense", "switch"]}},
        {"name": "second", "base": {"router": "dense", "init": {"from": "stage:first/dense"}}},
        {"name": "last", "grid": {"arm": arms}},
    ]
    experiment = expand_staged(stages=stages, grid={}, seeds=[0])
    scratch, named, second = experiment.cells
    assert scratch.parents == ()
    assert (parent_of(named).stage, parent_of(named).arm) == ("first", "dense")
    assert parent_of(second).stage == "second"
    assert [cell.stage for cell in list_ancestors(experiment.cells)] == ["first", "second"]
    assert [stage.name for stage in build_stage_experiments(experiment)] == ["staged-first", "staged-second"]


def test_several_matching_runs_are_listed_in_an_error(expand_staged: Any) -> None:
    stages = [STAGES[0] | {"grid": {"train.learning_rate": [1e-3, 2e-3]}}, STAGES[1]]
    with pytest.raises(
        UsageError, match=r"'dense' would start from 2 runs of stage train \(dense, learning_rate=0.001;"
    ):
        expand_staged(stages=stages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stage:adapt", "init.from: stage:adapt in stage 'adapt': no stage before it has this name"),
        ("stage:trian", "earlier stages, train"),
        (
            "stage:train/swich",
            "init.from: stage:train/swich: arm of stage train: 'swich' is unknown. Did you mean 'switch'",
        ),
    ],
)
def test_an_unknown_stage_or_arm_is_one_line(expand_staged: Any, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        expand_staged(f"stages.adapt.base.init.from={source}")


def test_a_stage_outside_of_stages_is_refused(expand_staged: Any) -> None:
    with pytest.raises(UsageError, match="in an experiment without stages"):
        expand_staged("init.from=stage:train", stages=[])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "train"}], "stages must be none, or at least two"),
        ([{"name": "a"}, {"name": "a"}], "stages must be names that occur once"),
        ([{"name": "tuning"}, {"name": "b"}], "name of a stage must be another name"),
        ([{"name": "a/b"}, {"name": "b"}], "cannot be the name of a file"),
        ([{"base": {}}, {"name": "b"}], r"stages\[0\]: the key 'name' is missing"),
        ([{"name": "a", "grid": {"router": []}}, {"name": "b"}], r"stages.a.grid.router must be a list with at least"),
        ([{"name": "a", "steps": 3}, {"name": "b"}], r"stages\[0\].steps: .* has no key 'steps'"),
    ],
)
def test_mistakes_in_stages_are_one_line(expand_staged: Any, stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand_staged(stages=stages)


def test_an_override_reaches_the_stages_that_do_not_set_its_key(expand_staged: Any) -> None:
    experiment = expand_staged("train.steps=9", "train.batch_size=4")
    (cell, *_) = experiment.cells
    assert (cell.config.train.steps, parent_of(cell).config.train.steps) == (6, 9)
    assert (cell.config.train.batch_size, parent_of(cell).config.train.batch_size) == (4, 4)
    note = "train.steps is not changed in stage adapt, which sets it: stages.adapt.base.train.steps=..."
    assert note in experiment.notes


def test_an_override_of_a_stage_changes_this_stage(expand_staged: Any) -> None:
    (cell, *_) = expand_staged("stages.adapt.base.train.steps=5", "stages.train.base.model.ffn_width=96").cells
    assert (cell.config.train.steps, parent_of(cell).config.train.steps) == (5, 12)
    assert (cell.config.model.ffn_width, parent_of(cell).config.model.ffn_width) == (128, 96)
    experiment = expand_staged("stages.adapt.grid.train.learning_rate=[0.001,0.002]", "seeds=[0]")
    assert len(experiment.cells) == 4


def test_an_override_that_every_stage_sets_is_refused(expand_staged: Any) -> None:
    with pytest.raises(UsageError, match=r"task.data.held_out_domains: every stage sets it.*stages.train.base"):
        expand_staged("task.data.held_out_domains=[a]")


def test_tuning_runs_start_from_parents_of_their_own_seeds(expand_staged: Any) -> None:
    tune = {"grid": {"train.learning_rate": [1e-3, 2e-3]}, "seeds": [7]}
    experiment = expand_staged(tune=tune)
    assert {cell.seed for cell in list_tuning_cells(experiment)} == {7}
    assert {parent_of(cell).seed for cell in list_tuning_cells(experiment)} == {7}
    assert sorted(cell.seed for cell in list_earlier_cells(experiment)) == [0, 0, 1, 1, 7, 7]
    # The parents are not tuned: they have the rate of the file.
    assert {cell.config.train.learning_rate for cell in list_earlier_cells(experiment)} == {5e-3}


def test_a_cell_of_another_seed_has_parents_of_this_seed(expand_staged: Any) -> None:
    first, second = (expand_staged(f"seeds=[{seed}]").cells[0] for seed in (0, 5))
    assert change_seed(first, 5) == second
    assert expand_staged("seeds=[0]").design.key == expand_staged("seeds=[5]").design.key


def test_dry_run_and_foreground_name_the_stage(expand_staged: Any, tmp_path: Path) -> None:
    experiment = expand_staged("seeds=[0]")
    rows = list_actions(experiment, tmp_path / "results")
    assert [(row["stage"], row["arm"], row["action"]) for row in rows] == [
        (stage, arm, "train") for stage in ("train", "adapt") for arm in ("dense", "switch")
    ]
    phase, cell = select_phase_cell(experiment, "train: switch/0", tmp_path / "results")
    assert (phase.name, cell.arm, cell.stage) == ("staged-train", "switch", "train")
    with pytest.raises(
        UsageError, match=r"'switch' cannot start: init.from: switch, seed 0 of stage train .* no result"
    ):
        select_phase_cell(experiment, "switch", tmp_path / "results")


def test_the_record_of_a_stage_names_its_experiment(expand_staged: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    open_results(results)
    (stage,) = build_stage_experiments(expand_staged())
    record_experiment(results, stage)
    record = read_record(results / "experiments" / "staged-train.json")
    assert find_served_experiment(record) == "staged"


def test_a_cell_whose_parent_has_no_result_fails_in_one_line(expand_staged: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    open_results(results)
    experiment = expand_staged("seeds=[0]")
    ready, failed = split_orphans(results, experiment.cells)
    assert (ready, len(failed)) == ([], 2)
    write_failures(results, experiment.name, failed)
    assert (
        failed[0].error == f"init.from: dense, seed 0 of stage train (run {failed[0].cell.parents[0].id}) has no result"
    )
    assert describe_failure(failed[0]) == f"failed: dense seed 0 of stage adapt: {failed[0].error}"
    result = RunFolder.of(results, failed[0].cell.id).read_result()
    assert result is not None
    assert (result.status, result.error) == ("failed", failed[0].error)
