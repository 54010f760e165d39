"""The clustered task and the oracle router."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import Tokens
from support.training_cases import Run, tiny_config

from moebench.compatibility import check_cell
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.router import RouterBuildContext
from moebench.routing.routers.oracle import Oracle
from moebench.tasks.clustered import Clustered

SMALL = {"name": "clustered", "sequence_length": 6, "num_clusters": 4, "width": 3, "eval_sequences": 8}


def make_task(**options: object) -> Clustered:
    return Clustered(Clustered.Config(**{**SMALL, **options}))


def test_each_cluster_has_its_own_map() -> None:
    task = make_task(noise=0.0)
    batch = task.train_batch(5, 0, 0)
    for sequence in range(5):
        for position in range(6):
            label = batch.label_BL[sequence, position]
            offset = (batch.input_BL[sequence, position] - task.centre_YW[label]) / 0.5
            by_hand = sum(task.map_YWV[label][:, column] * offset[column] for column in range(3))
            torch.testing.assert_close(batch.target_BP[sequence, position], by_hand)


def test_spread_and_noise_are_those_of_the_options() -> None:
    task = make_task(spread=0.25, noise=0.3, width=8)
    batch = task.train_batch(500, 0, 0)
    offset = batch.input_BL - task.centre_YW[batch.label_BL]
    assert offset.std().item() == pytest.approx(0.25, rel=0.03)
    noise = batch.target_BP - task.apply_maps(batch.input_BL, batch.label_BL)
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.bincount(batch.label_BL.flatten()).min() > 3000 / 4 * 0.9


def test_batches_are_a_function_of_seed_and_step() -> None:
    task = make_task()
    first = task.train_batch(8, 3, 5)
    assert torch.equal(task.train_batch(8, 3, 5).input_BL, first.input_BL)
    assert not torch.equal(task.train_batch(8, 3, 6).input_BL, first.input_BL)
    part = task.train_batch(8, 3, 5, slice(2, 5))
    assert torch.equal(part.target_BP, first.target_BP[2:5])
    assert torch.equal(part.label_BL, first.label_BL[2:5])
    (ours,), (theirs,) = task.eval_batches("test", 4), task.eval_batches("test", 64)
    assert torch.equal(ours.input_BL, theirs.input_BL)
    assert not torch.equal(ours.input_BL, task.eval_batches("validation", 4)[0].input_BL)
    assert len({make_task(data_seed=seed).eval_digest for seed in range(3)}) == 3


def test_error_and_gap_by_hand() -> None:
    task = make_task()
    (batch,) = task.eval_batches("test", 8)
    noiseless = task.apply_maps(batch.input_BL, batch.label_BL)
    noise = float((noiseless - batch.target_BP).square().mean())
    for output, mse in ((noiseless, noise), (batch.target_BP + 2, 4.0)):
        sums = {name: value.sum(0, keepdim=True) for name, value in task.compute_sums(output, batch).items()}
        assert task.compute_quality(sums) == pytest.approx({"mse": mse, "oracle_gap": mse - noise}, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(task.loss(batch.target_BP + 2, batch), torch.full((8, 6), 0.5 * 4 * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_clusters": 0}, "task.num_clusters"), ({"spread": 0.0}, "task.spread"), ({"noise": -1.0}, "task.noise")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message} must be "):
        make_task(**options)


def test_the_oracle_sends_each_token_to_its_label() -> None:
    tokens = Tokens.draw(6)
    label_T = torch.tensor([0, 1, 2, 3, 4, 5])
    router = Oracle(Oracle.Config(), RouterBuildContext(d_model=8, num_experts=4))
    routing = router(tokens.x_TD, replace(tokens.context(training=True), features={TokenLabels: label_T}))
    assert routing.expert_N.tolist() == [0, 1, 2, 3, 0, 1]
    assert routing.weight_N.tolist() == [1.0] * 6


def test_the_oracle_is_refused_on_tasks_without_labels() -> None:
    message = r"^router\.name: 'oracle' needs a label of each token, which task 'language' does not have \(.*clustered"
    with pytest.raises(UsageError, match=message):
        check_cell(resolve({"router": "oracle"}))
    check_cell(resolve({"router": "oracle", "task": "clustered"}))


@pytest.mark.parametrize("router", ["oracle", "dense", pytest.param("expert_choice", marks=pytest.mark.slow)])
def test_it_trains(tmp_path: Path, router: str) -> None:
    train = {"steps": 100, "learning_rate": 2e-2, "eval_every": 200, "log_every": 100}
    config = tiny_config(tmp_path, task=SMALL, router=router, train=train)
    result = Run(config, tmp_path)()
    assert result is not None
    (batch,) = make_task().eval_batches("test", 8)
    untrained = float(batch.target_BP.square().mean())  # the head starts at zero
    assert result.metrics["mse"] < 0.9 * untrained
    assert result.metrics["oracle_gap"] == pytest.approx(result.metrics["mse"] - 0.01, abs=0.004)  # noise² = 0.01
