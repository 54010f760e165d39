"""Gain and forgetting of arms: signs, averages, references and corrections; parents on the data of their children."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.parent_runs import WIDE, child_config, train_parent

from moebench.analysis.trained_run import TrainedRun
from moebench.analysis.transfer.evaluation_text import DomainText, EvaluationText
from moebench.analysis.transfer.measure import RunTransfer, evaluate_on
from moebench.analysis.transfer.report import build_transfer_tables
from moebench.analysis.transfer.values import Transfer, compare_with_reference, correct_changes, summarise_arm
from moebench.errors import UsageError
from moebench.parallel.mesh import Mesh
from moebench.runs.folder import RunFolder
from moebench.training.evaluation import evaluate
from moebench.training.model import prepare_task


def run_of(seed: int, parent: tuple[float, float], child: tuple[float, float]) -> RunTransfer:
    """Return a run with (target, sources) of the parent and of itself."""
    return RunTransfer(
        seed=seed,
        target=("code",),
        sources=("docs",),
        parent_target=parent[0],
        child_target=child[0],
        parent_source=parent[1],
        child_source=child[1],
        parent_domains={"code": parent[0], "docs": parent[1]},
        child_domains={"code": child[0], "docs": child[1]},
        train_flops=(10.0, 2.0),
        train_s=(5.0, 1.0),
    )


RUNS = [run_of(0, (4.0, 2.0), (3.0, 2.5)), run_of(1, (4.2, 2.0), (3.0, 2.6)), run_of(2, (4.1, 2.1), (3.0, 2.5))]


def test_gain_and_forgetting_are_positive_where_a_run_learns_and_forgets() -> None:
    arm = summarise_arm("dense", RUNS, lower_is_better=True)
    assert arm.gain.mean == pytest.approx((1.0 + 1.2 + 1.1) / 3)
    assert arm.forgetting is not None
    assert arm.forgetting.mean == pytest.approx((0.5 + 0.6 + 0.4) / 3)
    assert arm.gain.interval is not None
    assert arm.gain.p is not None
    assert arm.domain_changes == {"code": pytest.approx(-1.1), "docs": pytest.approx(0.5)}


def test_signs_of_a_metric_that_is_better_when_higher() -> None:
    arm = summarise_arm("dense", [run_of(0, (0.5, 0.9), (0.8, 0.6))], lower_is_better=False)
    assert arm.gain.mean == pytest.approx(0.3)
    assert arm.forgetting is not None
    assert arm.forgetting.mean == pytest.approx(0.3)
    assert arm.gain.interval is None  # one seed


def test_a_run_without_sources_has_no_forgetting() -> None:
    runs = [replace(run, sources=(), parent_source=None, child_source=None) for run in RUNS]
    assert summarise_arm("dense", runs, lower_is_better=True).forgetting is None


def test_the_difference_to_the_reference_is_paired_by_seed() -> None:
    reference = summarise_arm("dense", RUNS[:2], lower_is_better=True)
    better = [run_of(run.seed, (run.parent_target, 2.0), (run.child_target - 0.1, 2.0)) for run in RUNS]
    gain, loss = compare_with_reference(
        summarise_arm("switch", better, lower_is_better=True), reference, lower_is_better=True
    )
    assert gain is not None
    assert loss is not None
    assert gain.mean == pytest.approx(0.1)
    assert loss.mean == pytest.approx(-(0.5 + 0.6) / 2)


def test_tables_say_why_there_is_no_interval_and_which_arms_are_not_matched() -> None:
    few, enough = (summarise_arm(name, RUNS[:n], lower_is_better=True) for name, n in (("dense", 2), ("switch", 3)))
    switch = replace(enough, reference="dense", reference_marks=("≠FLOPs",), gain_difference=enough.gain)
    change, reference, *_ = build_transfer_tables(Transfer(metric="bits_per_byte", arms=(few, switch)))
    assert "dense: no interval and no p value with fewer than 3 seeds." in change.notes
    assert reference.rows[0][:2] == ("switch (≠FLOPs)", "dense")
    assert reference.notes[0].startswith("≠FLOPs: executed forward FLOPs per token")
    (change, *_) = build_transfer_tables(Transfer(metric="bits_per_byte", arms=(few,)))
    assert "no interval and no p value with fewer than 3 seeds." in change.notes
    (change, *_) = build_transfer_tables(Transfer(metric="bits_per_byte", arms=(enough,)))
    assert not any("no interval" in note for note in change.notes)


def test_p_values_are_corrected_over_the_arms() -> None:
    arm = summarise_arm("dense", RUNS, lower_is_better=True)
    corrected = correct_changes({"dense": arm.gain, "switch": arm.gain, "none": None})
    assert corrected["none"] is None
    assert corrected["dense"] is not None
    assert corrected["dense"].p_holm == pytest.approx(2 * (arm.gain.p or 0))


def test_domains_are_weighted_by_their_size() -> None:
    domains = {"a": DomainText(digest="x", weight=1.0), "b": DomainText(digest="y", weight=3.0)}
    text = EvaluationText(domains=domains, trained=("a", "b"))
    assert text.average({"a": 1.0, "b": 2.0}, ("a", "b")) == pytest.approx(1.75)
    other = EvaluationText(domains={"a": DomainText(digest="z", weight=1.0)}, trained=("a",))
    assert not text.has(other, "a")


@pytest.mark.parametrize(
    "router",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("domain", "task_level", "top_k")),
        {"name": "domain", "domains": ["xyz", "ab"]},
        "domain_posterior",
    ],
)
def test_a_parent_is_evaluated_on_the_data_of_its_child_with_its_own_experts(router: object, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    rows = [{"text": f"{name} {i} " * 20, "domain": name} for i in range(10) for name in ("ab", "klm", "xyz")]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    layout = {**WIDE["layout"], "num_experts": 2}
    of_parent, of_child = ({"data": {"held_out_domains": held_out}} for held_out in (["klm"], ["ab", "xyz"]))
    run = train_parent(tmp_path, file, router=router, layout=layout, task=of_parent)
    child = child_config(file, router="top_k", layout=layout, task={"eval_windows": 3, **of_child})
    task = prepare_task(run.config, tmp_path)
    trained = TrainedRun(folder=RunFolder(run.folder), cell={}, config=run.config, task=task)
    child_task = prepare_task(child, tmp_path)
    assert child_task.domains != task.domains
    measured = evaluate_on(trained, "child", child_task)

    same_text = replace(run.config, task=replace(run.config.task, eval_windows=3))  # type: ignore[call-arg]
    other_task = prepare_task(same_text, tmp_path)
    batches = other_task.eval_batches("test", run.config.train.batch_size)
    expected = evaluate(trained.load_model(), other_task, batches, run.config.seed, "cpu", Mesh()).quality
    for name in ("ab", "klm", "xyz"):
        assert measured[f"bits_per_byte/{name}"] == pytest.approx(expected[f"bits_per_byte/{name}"], rel=1e-6)


def test_a_parent_with_another_vocabulary_is_not_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"some text {i} " * 20}) for i in range(10)))
    run = train_parent(tmp_path, file)
    task = prepare_task(run.config, tmp_path)
    trained = TrainedRun(folder=RunFolder(run.folder), cell={}, config=run.config, task=task)
    other = child_config(file, router="dense", task={"data": {"tokenizer": "bpe4096"}})
    with pytest.raises(UsageError, match=r"run 0{12} cannot be evaluated on the data of run child: embedding and head"):
        evaluate_on(trained, "child", prepare_task(other, tmp_path))
