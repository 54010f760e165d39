"""Laws of finished runs: which runs count, what is refused, what the command prints."""

import json
import re
from dataclasses import replace

import pytest
from support.command_line import ROOT
from support.run_folders import write_data_digests
from support.scaling_ladder import FEW, LAW, expand_ladder, write_runs
from support.tiny_experiment import write_text

from moebench.analysis.scaling.report import build_report, fit_laws
from moebench.analysis.scaling.runs import collect_runs
from moebench.errors import UsageError
from moebench.experiment.grid import expand
from moebench.experiment.seed_plan import list_added_cells
from moebench.experiment.store import record_experiment
from moebench.runs.folder import RunFolder


def test_the_planted_law_of_each_router(tmp_path):
    grid = FEW["grid"] | {"router": ["dense", "switch", "top_k"]}
    experiment = expand_ladder(tmp_path, grid=grid, seeds=[0, 1])
    write_runs(experiment, tmp_path / "results")
    ladder = collect_runs([experiment], tmp_path / "results")
    assert [runs.label for runs in ladder.routers] == ["switch", "top_k"]
    # 2 seeds of 4 widths: dense once, experts three times. Four numbers of experts leave out E_max.
    assert [(len(runs.points), runs.form) for runs in ladder.routers] == [(32, "start")] * 2
    report = build_report(ladder, fit_laws(ladder, 40, 0))
    for router in report.values["routers"]:
        values = {row["name"]: row["value"] for row in router["coefficients"]}
        assert values["a"] == pytest.approx(LAW.a, abs=0.001)
        assert values["c"] == pytest.approx(LAW.c, abs=0.001)
        assert values["e_max"] is None
        for row in router["effective_params"]:
            ratio = float(LAW.effective_params(row["num_params"], row["num_experts"])) / row["num_params"]
            assert row["ratio"] == pytest.approx(ratio, rel=0.02)
            assert row["low"] <= row["ratio"] <= row["high"]
        assert len(router["effective_params"]) == 12
    json.loads(report.to_json())
    assert "too few numbers of experts for six coefficients: E_max infinite" in report.to_markdown()


def test_sizes_below_trivial_baselines_are_named(tmp_path):
    experiment, results = expand_ladder(tmp_path), tmp_path / "results"
    write_runs(experiment, results)
    dense = [cell for cell in experiment.cells if cell.config.router.name == "dense"]
    write_data_digests(results, [cell for cell in dense if cell.config.model.d_model in (16, 32)])
    for cell in dense:
        folder = RunFolder.of(results, cell.id)
        value = 9.0 if cell.config.model.d_model == 16 else 1e-3
        folder.write_result(replace(folder.read_result(), metrics={"bits_per_byte": value}))
    problems = collect_runs([experiment], results).problems
    marks = [problem for problem in problems if "below trivial" in problem]
    assert marks == ["dense with 25.6k parameters: below trivial baselines: a ranking at this size says little"]


def test_groups_of_one_router_are_named_by_their_options(tmp_path):
    grid = {"router": ["dense", {"name": "switch", "jitter": 0.0}, {"name": "switch", "jitter": 0.1}]}
    experiment = expand_ladder(tmp_path, grid=grid | {key: FEW["grid"][key] for key in [*FEW["grid"]][1:]})
    write_runs(experiment, tmp_path / "results")
    ladder = collect_runs([experiment], tmp_path / "results")
    assert [runs.label for runs in ladder.routers] == ["switch, router.jitter=0.0", "switch, router.jitter=0.1"]


def test_seeds_that_were_added_to_an_arm_count(tmp_path):
    experiment, results = expand_ladder(tmp_path), tmp_path / "results"
    added = {experiment.cells[-1].arm: (7, 8)}
    (results / "experiments").mkdir(parents=True)
    record_experiment(results, experiment, added)
    write_runs(replace(experiment, cells=(*experiment.cells, *list_added_cells(experiment.cells, added))), results)
    (router,) = collect_runs([experiment], results).routers
    assert len(router.points) == len(experiment.cells) + 2


def test_the_split_is_a_choice(tmp_path):
    experiment = expand_ladder(tmp_path)
    write_runs(experiment, tmp_path / "results")
    test, validation = (collect_runs([experiment], tmp_path / "results", split) for split in ("test", "validation"))
    ratio = validation.routers[0].points.loss_M / test.routers[0].points.loss_M
    assert ratio == pytest.approx(2)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ({"layout.num_experts": [4]}, r"switch: 2 numbers of experts \(1, 4\); at least 3, dense is 1"),
        ({"model.d_model": [16, 128]}, "switch: 2 model sizes; at least 3"),
        ({"model.d_model": [16, 32, 64]}, "training FLOPs are 1.2 decades of compute; at least 1.5"),
        ({"router": ["dense"]}, r"no cell with experts of ladder is done there \(train it with `moebench run`\)"),
        ({"router": ["switch"], "model.d_model": [16, 64, 128], "layout.num_experts": [2, 4]}, "2 numbers of experts"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(tmp_path, grid, text):
    values = FEW["grid"] | grid
    if values["router"] == ["dense"]:
        del values["layout.num_experts"]
    experiment = expand_ladder(tmp_path, grid=values)
    write_runs(experiment, tmp_path / "results")
    with pytest.raises(UsageError, match=text) as refused:
        collect_runs([experiment], tmp_path / "results")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"metrics": {}}, "a run has no recorded loss on this split above 0"),
        ({"metrics": {"bits_per_byte": 0.0}}, "a run has no recorded loss on this split above 0"),
        ({"metrics": {"bits_per_byte": float("nan")}}, "a run has no recorded loss on this split above 0"),
        ({"cost": {}}, "a run has no recorded cost above 0"),
    ],
)
def test_runs_without_numbers_are_refused(tmp_path, changes, text):
    experiment = expand_ladder(tmp_path)
    write_runs(experiment, tmp_path / "results", **changes)
    with pytest.raises(UsageError, match=text):
        collect_runs([experiment], tmp_path / "results")


def test_tokens_that_differ_at_one_size_are_refused(tmp_path):
    experiment = expand_ladder(tmp_path)
    write_runs(experiment, tmp_path / "results")
    shorter = replace(experiment, cells=experiment.cells[:1])
    cost = {"active_params": 25_600.0, "flops_per_token": 51_200.0, "train_tokens": 9e5}
    write_runs(shorter, tmp_path / "results", cost=cost)
    with pytest.raises(UsageError, match=r"models of one size saw 900k or 1\.00M tokens"):
        collect_runs([experiment], tmp_path / "results")


def test_missing_failed_and_otherwise_evaluated_runs_are_named(tmp_path):
    experiment = expand_ladder(tmp_path, seeds=[0, 1])
    write_runs(experiment, tmp_path / "results")
    write_runs(
        replace(experiment, cells=experiment.cells[:2]), tmp_path / "results", status="failed", error="it diverged"
    )
    write_runs(replace(experiment, cells=experiment.cells[2:3]), tmp_path / "results", eval_digest="other")
    (RunFolder.of(tmp_path / "results", experiment.cells[-1].id).path / "result.json").unlink()
    problems = collect_runs([experiment], tmp_path / "results").problems
    assert problems == (
        "FAILED: 2 runs without a final loss; a law of the others may be too good",
        "1 of 32 cells have no result yet",
        "the sizes were evaluated on different data or windows, so part of their differences is not of size",
    )


def test_a_task_without_a_loss_is_refused(tmp_path):
    experiment = expand_ladder(tmp_path, base={"task": {"name": "vision"}}, grid={"router": ["dense", "switch"]})
    with pytest.raises(UsageError, match="'vision' is measured by accuracy; the law is one of losses"):
        collect_runs([experiment], tmp_path / "results")


def test_the_experiment_of_the_page_can_be_fitted(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    (tmp_path / "ladder.yaml").write_text(text)
    write_text(tmp_path / "text")
    experiment = expand(tmp_path / "ladder.yaml", [f"task.data.path={tmp_path / 'text'}"])
    assert len(experiment.cells) == 3 * 4 * 5
    write_runs(experiment, tmp_path / "results")
    (runs,) = collect_runs([experiment], tmp_path / "results").routers
    assert (runs.label, runs.form, runs.refusal) == ("switch", "saturating", "")
