"""The planned seeds of an experiment: recorded by the first run, kept by later ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.run_folders import write_result

from moebench.analysis.compare.experiment import read_plan
from moebench.analysis.design.levels import compute_level
from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.seed_plan import (
    PlanEntry,
    SeedDesign,
    SeedPlan,
    append_run,
    find_seed_plan,
    list_added_cells,
    read_seed_plan,
)
from moebench.experiment.store import open_results, record_experiment

TINY = {
    "question": "How many seeds?",
    "base": {"task": {"name": "clustered"}, "train": {"steps": 2, "warmup_steps": 1}},
    "grid": {"router": ["dense", "switch"]},
}


def build(tmp_path: Path, *overrides: str) -> Experiment:
    """Return the experiment of a file with five seeds by default."""
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(TINY))
    return expand(file, overrides)


def read_record(results: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((results / "experiments" / "tiny.json").read_text())
    return record


def finish(results: Path, experiment: Experiment, num_seeds: int) -> None:
    """Write results of the first seeds of the baseline."""
    for cell in experiment.cells:
        if cell.arm == "dense" and cell.seed < num_seeds:
            folder = results / "runs" / cell.id
            folder.mkdir(parents=True, exist_ok=True)
            write_result(folder, arm=cell.arm, seed=cell.seed)


def plan_of(results: Path, experiment: Experiment) -> SeedPlan:
    assert experiment.design is not None
    return read_seed_plan(read_record(results), experiment.design.key)


def test_an_experiment_has_five_seeds_and_one_plan_for_all_of_them(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    assert experiment.design is not None
    assert experiment.design.seeds == (0, 1, 2, 3, 4)
    assert build(tmp_path, "seeds=[7,8]").design.key == experiment.design.key  # type: ignore[union-attr]
    assert build(tmp_path, "train.steps=3").design.key != experiment.design.key  # type: ignore[union-attr]


def test_the_first_run_records_the_plan_and_later_runs_append(tmp_path: Path) -> None:
    results, five = tmp_path / "results", build(tmp_path)
    open_results(results)
    record_experiment(results, five)
    assert [each["planned"] for each in read_record(results)["seed_plans"].values()] == [5]  # type: ignore[attr-defined]
    finish(results, five, 5)
    record_experiment(results, five)  # the same again
    record_experiment(results, build(tmp_path, "seeds=[0,1,2,3,4,5,6,7]"))
    plan = plan_of(results, five)
    assert [len(entry.seeds) for entry in plan.entries] == [5, 8]
    assert plan.entries[1].num_finished == 5
    assert (len(plan.planned), len(plan.final), plan.extensions) == (5, 5, (tuple(range(8)),))


def test_a_plan_without_tested_results_is_replaced(tmp_path: Path) -> None:
    results, three = tmp_path / "results", build(tmp_path, "seeds=[0,1,2]")
    open_results(results)
    record_experiment(results, three)
    finish(results, three, 2)  # too few for a test
    record_experiment(results, build(tmp_path))
    plan = plan_of(results, three)
    assert (plan.planned, plan.extensions) == ((0, 1, 2, 3, 4), ())
    assert len(plan.entries) == 2


def test_a_trial_with_one_seed_is_no_plan(tmp_path: Path) -> None:
    results, one = tmp_path / "results", build(tmp_path, "seeds=[0]")
    open_results(results)
    record_experiment(results, one)
    assert plan_of(results, one).planned == ()
    assert find_seed_plan(read_record(results), build(tmp_path).design).planned == (0, 1, 2, 3, 4)


def test_a_maximum_that_is_named_first_is_part_of_the_plan(tmp_path: Path) -> None:
    results, experiment = tmp_path / "results", build(tmp_path)
    assert experiment.design is not None
    open_results(results)
    record_experiment(results, replace(experiment, design=replace(experiment.design, maximum=8)))
    finish(results, experiment, 5)
    record_experiment(results, experiment)  # `run` without --until: nothing new
    plan = plan_of(results, experiment)
    assert (len(plan.planned), len(plan.final), plan.extensions, len(plan.entries)) == (5, 8, (), 1)


def test_added_seeds_follow_those_of_the_file_and_are_none_of_tuning() -> None:
    design = SeedDesign(key="k", seeds=(0, 1, 4), maximum=6, reserved=(5,))
    assert design.final_seeds == (0, 1, 4, 6, 7, 8)
    assert replace(design, maximum=2).final_seeds == (0, 1, 4)


def test_added_cells_are_those_of_a_grid_with_these_seeds(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    added = list_added_cells(experiment.cells, {"switch": (5, 6), "gone": (5,)})
    assert [(cell.arm, cell.seed) for cell in added] == [("switch", 5), ("switch", 6)]
    larger = {(cell.arm, cell.seed): cell for cell in build(tmp_path, "seeds=[5,6]").cells}
    assert [cell.id for cell in added] == [larger["switch", seed].id for seed in (5, 6)]
    assert added[0].id == cell_id(added[0].config, added[0].data_digest)


def test_the_record_lists_added_cells_too(tmp_path: Path) -> None:
    results, experiment = tmp_path / "results", build(tmp_path)
    open_results(results)
    record_experiment(results, experiment, {"switch": (5,)})
    record_experiment(results, experiment)
    cells = read_record(results)["cells"]
    assert len(cells) == 11  # type: ignore[arg-type]
    assert plan_of(results, experiment).added == {"switch": (5,)}


@pytest.mark.parametrize(
    "damage",
    [
        {"history": 3, "added": {}},
        {"history": [{"time": 0, "seeds": [0], "final_seeds": [], "num_finished": 0}], "added": {}},
        {"history": [{"time": 0, "seeds": [-1], "final_seeds": [0], "num_finished": 0}], "added": {}},
        {"history": [{"time": 0, "seeds": [True], "final_seeds": [0], "num_finished": 0}], "added": {}},
        {"history": [{"time": 0, "seeds": list(range(2000)), "final_seeds": [0], "num_finished": 0}], "added": {}},
        {"history": [{"seeds": [0], "final_seeds": [0], "num_finished": 0}], "added": {}},
        {"history": [7], "added": {}},
        {"history": [], "added": {"switch": "5"}},
        [],
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(damage: object) -> None:
    with pytest.raises(UsageError, match="record of experiment 'tiny': 'seed_plans' is damaged") as error:
        read_seed_plan({"name": "tiny", "seed_plans": {"k": damage}}, "k")
    assert "\n" not in str(error.value)


def test_a_plan_survives_json() -> None:
    entry = PlanEntry(time=1.5, seeds=(0, 1, 2), final_seeds=(0, 1, 2, 3), num_finished=0)
    plan = SeedPlan(entries=(entry,), added={"switch": (3,)})
    values = json.loads(json.dumps({"seed_plans": {"k": plan.to_dict()}}))
    assert read_seed_plan(values, "k") == plan


def test_a_run_of_fewer_seeds_is_no_extension() -> None:
    plan = SeedPlan()
    for number, seeds in enumerate([(0, 1, 2, 3, 4), (0, 1, 2), (0, 1, 2, 3, 4, 5), (5, 6, 7, 8, 9, 10)]):
        plan = append_run(plan, SeedDesign(key="k", seeds=seeds), num_finished=5 * (number > 0), time=0.0)
    assert plan.extensions == ((0, 1, 2, 3, 4, 5),)  # the last ones are other seeds, not more of them


@pytest.mark.parametrize("damage", ["{", "[]", '{"name": "tiny", "cells": [], "margin": NaN}', '{"seed_plans": [1]}'])
def test_a_damaged_record_is_noted(tmp_path: Path, damage: str) -> None:
    experiment = build(tmp_path)
    assert read_plan(experiment, tmp_path)[1] == []
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tiny.json").write_text(damage)
    plan, (note,) = read_plan(experiment, tmp_path)
    assert plan == replace(read_plan(experiment, tmp_path / "none")[0], is_lost=True)
    assert "tiny.json" in note
    # Written again by a run, the record is valid, and what was planned is still not known.
    record_experiment(tmp_path, experiment)
    for _ in range(2):
        plan, notes = read_plan(experiment, tmp_path)
        assert (plan.is_lost, notes) == (True, [])
        level = compute_level(plan, plan.planned)
        assert (level.alpha, "record of the planned seeds was damaged" in level.note) == (0.001, True)
        record_experiment(tmp_path, experiment)
