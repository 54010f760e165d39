"""The split that arms are compared on, and notes on varied settings."""

from dataclasses import replace

import pytest
from support.comparison_runs import fail_seeds, list_cells, make_results, summary_of

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.values import BITS_PER_BYTE
from moebench.errors import UsageError
from moebench.runs.result import Fault

VALIDATION = replace(BITS_PER_BYTE, split="validation")


def test_the_split_can_be_chosen_and_is_named():
    results = make_results({"dense": 0, "switch": -0.01})
    results = [replace(r, validation={"bits_per_byte": 4 - r.metrics["bits_per_byte"]}) for r in results]
    on_test, on_validation = (
        compare(results, expected=list_cells(results), baseline="dense", metric=metric)
        for metric in (BITS_PER_BYTE, VALIDATION)
    )
    assert on_test.differences[0].mean == pytest.approx(-0.01)
    assert on_validation.differences[0].mean == pytest.approx(0.01)
    assert summary_of(on_validation, "dense").values[1] == pytest.approx(1.98)
    assert summary_of(on_validation, "dense").domains == {}
    assert (on_test.to_dict()["split"], on_validation.to_dict()["split"]) == ("test", "validation")


def test_results_without_validation_metrics_are_named():
    results = make_results({"dense": 0, "switch": -0.01})
    with_validation = [replace(r, validation=r.metrics) for r in results]
    old = [*with_validation[:-1], results[-1]]
    message = r"--split validation: 1 of 10 results have no validation metrics, first switch, seed 4 \(switch-4\)"
    with pytest.raises(UsageError, match=message):
        compare(old, expected=list_cells(results), baseline="dense", metric=VALIDATION)
    failed = fail_seeds(with_validation, "switch", (4,), Fault.DIVERGED)
    failed[-1] = replace(failed[-1], validation={})  # a failure has no metrics of any split
    comparison = compare(failed, expected=list_cells(results), baseline="dense", metric=VALIDATION)
    assert comparison.describe_verdict("switch") == "1 of 5 diverged"


def settings(**sections: dict[str, object]) -> dict[str, object]:
    plain = {"train": {"learning_rate": 0.002, "steps": 9}, "router": {"name": "switch", "losses": {"balance": 0.01}}}
    return plain | {"parallel": {"data": 1}, "layout": {"name": "every_n", "n": 1}} | sections


ONE_LOSS_LESS = settings(router={"name": "switch", "losses": {}})


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (settings(), None),
        (settings(router={"name": "top_k", "losses": {"balance": 0.1}}), None),  # another algorithm, its own losses
        (settings(layout={"name": "every_n", "n": 2}), None),
        (settings(parallel={"data": 2}), None),
        (settings(train={"learning_rate": 0.006, "steps": 9}), "train.learning_rate"),
        (settings(router={"name": "switch", "losses": {"balance": 0.1}}), "router.losses.balance"),
        (ONE_LOSS_LESS, "router.losses.balance"),
        (ONE_LOSS_LESS | {"balance": {"scope": "local"}}, "balance.scope, router.losses.balance"),
    ],
)
def test_a_grid_of_settings_says_on_which_split_to_choose(other, named):
    results = [
        replace(r, config=settings() if r.arm == "dense" else other, validation=r.metrics)
        for r in make_results({"dense": 0, "switch": -0.01})
    ]
    for metric, words in (
        (BITS_PER_BYTE, "who chooses by this table tunes on test; choose with --split validation, and"),
        (VALIDATION, "choose on validation, as here, and"),
    ):
        notes = compare(results, expected=list_cells(results), baseline="dense", metric=metric).notes
        note = f"this grid varies {named}: {words} report what was chosen on test with fresh seeds"
        assert notes == ((note,) if named else ())
