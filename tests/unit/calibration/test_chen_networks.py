"""The synthetic experiment of Chen et al.: data by their definition, experts row by row, the published protocol."""

import threading

import pytest
import torch

from moebench.calibration.chen2022 import measure, training
from moebench.calibration.chen2022.data import (
    NUM_CLUSTERS,
    NUM_PATCHES,
    PATCH_LENGTH,
    SCALE,
    SETTINGS,
    Directions,
    draw_examples,
)
from moebench.calibration.chen2022.measure import list_runs, measure_runs
from moebench.calibration.chen2022.model import NUM_EXPERTS, PatchBank, PatchMixture
from moebench.calibration.chen2022.published import PUBLISHED
from moebench.calibration.chen2022.report import build_report
from moebench.calibration.chen2022.training import (
    KINDS,
    TrainingOutcome,
    TrainingStopped,
    measure_dispatch_entropy,
    normalise_gradients,
    train_and_test,
    train_mixture,
)
from moebench.routing.values import LayerRecord, Routing
from moebench.seeds import make_generator


def draw(setting, num_examples=2000):
    generator = make_generator("test", setting.name)
    directions = Directions.draw(generator)
    return directions, draw_examples(setting, directions, num_examples, generator)


def test_directions_are_orthonormal():
    directions, _ = draw(SETTINGS[0], 10)
    all_YI = torch.cat([directions.feature_YI, directions.centre_YI])
    torch.testing.assert_close(all_YI @ all_YI.T, torch.eye(2 * NUM_CLUSTERS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_example_has_the_four_patches_of_the_definition(setting):
    directions, data = draw(setting)
    patches_TPI = data.x_TD.view(-1, NUM_PATCHES, PATCH_LENGTH) / SCALE
    feature_TPY = patches_TPI @ directions.feature_YI.T
    centre_TPY = patches_TPI @ directions.centre_YI.T
    # Three patches are multiples of one direction: the part outside the eight directions is the noise patch's alone.
    outside_TP = patches_TPI.square().sum(-1) - feature_TPY.square().sum(-1) - centre_TPY.square().sum(-1)
    noise_T = outside_TP.argmax(1)
    assert outside_TP.gather(1, noise_T[:, None]).mean() == pytest.approx(setting.noise_std**2 * 42 / 50, rel=0.05)
    pure_TPY = feature_TPY.clone()
    pure_TPY[torch.arange(len(noise_T)), noise_T] = 0
    sign_T = 2 * data.label_T - 1
    own_T = pure_TPY.sum(1).gather(1, data.cluster_T[:, None])[:, 0] * sign_T
    assert own_T.min() >= 0.5 - 1e-4  # alpha, with the sign of the label
    assert 1.9 < own_T.max() <= 2.0 + 1e-4
    others_TY = pure_TPY.sum(1).scatter(1, data.cluster_T[:, None], 0.0)
    assert torch.equal((others_TY.abs() > 0.4).sum(1), torch.ones_like(data.label_T))  # one other cluster misleads
    assert others_TY.abs().max() == pytest.approx(setting.highest_feature_noise, rel=0.02)
    assert (others_TY.sum(1) > 0).double().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(centre_TPY.abs().amax(1).argmax(1), data.cluster_T)
    assert set(noise_T.tolist()) == {0, 1, 2, 3}  # the order of patches is random


@pytest.mark.parametrize("is_cubic", [True, False])
def test_the_mixture_is_the_weighted_output_of_one_expert(is_cubic):
    _, data = draw(SETTINGS[0], 30)
    model = PatchMixture(is_cubic=is_cubic, seed=0)
    with torch.no_grad():
        model.bank.weight_EIF *= 100
        output_TC, record = model(data.x_TD, 0)
    routing = record.kept
    assert torch.equal(routing.token_N, torch.arange(30))
    assert len(set(routing.expert_N.tolist())) > 3  # the noise alone routes at the start
    assert routing.weight_N.min() > 0.2  # the largest of eight uniform draws
    for token in range(30):
        expert = int(routing.expert_N[token])
        by_hand = torch.zeros(2)
        for patch in data.x_TD[token].view(NUM_PATCHES, PATCH_LENGTH):
            hidden = patch @ model.bank.weight_EIF[expert] + model.bank.bias_EF[expert]
            hidden = hidden**3 if is_cubic else hidden
            by_hand += torch.stack([hidden[:8].sum(), hidden[8:].sum()])
        torch.testing.assert_close(output_TC[token], routing.weight_N[token] * by_hand, rtol=1e-4, atol=1e-6)


def test_gradients_are_divided_by_the_sum_of_two_norms():
    bank = PatchBank(2, 1, is_cubic=True)
    bank.weight_EIF.grad, bank.bias_EF.grad = torch.zeros(2, PATCH_LENGTH, 2), torch.zeros(2, 2)
    bank.weight_EIF.grad[0, :2, 0] = torch.tensor([3.0, 4.0])  # norm 5
    bank.bias_EF.grad[0] = torch.tensor([0.0, 5.0])
    normalise_gradients(bank)
    assert bank.weight_EIF.grad[0, :2, 0].tolist() == pytest.approx([0.3, 0.4])
    assert bank.bias_EF.grad[0].tolist() == pytest.approx([0.0, 0.5])
    assert not bank.weight_EIF.grad[1].any()  # an expert without tokens


def test_dispatch_entropy_by_hand():
    # Expert 0 has two tokens of cluster 0; expert 1 one of each of two clusters: 2/4 · 0 + 2/4 · ln 2.
    expert_T1 = torch.tensor([[0], [0], [1], [1]])
    routing = Routing.from_top_k(expert_T1, torch.ones(4, 1), num_experts=NUM_EXPERTS)
    record = LayerRecord(routing=routing, kept=routing)
    assert measure_dispatch_entropy(record, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.34657, abs=1e-4)


def test_training_specialises_experts_on_clusters(monkeypatch):
    monkeypatch.setattr(training, "MIXTURE_STEPS", 150)
    _, data = draw(SETTINGS[2])
    model = PatchMixture(is_cubic=True, seed=0)
    before = measure_dispatch_entropy(model(data.x_TD, 0)[1], data.cluster_T)
    after = measure_dispatch_entropy(train_mixture(model, data), data.cluster_T)
    assert before > 1.35
    assert after < 0.9


def test_outcomes_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(training, "MIXTURE_STEPS", 20)
    monkeypatch.setattr(measure, "train_and_test", train_briefly)
    runs = list_runs(SETTINGS[:2], KINDS[:2], 2)
    several, single = [], []
    measure_runs(runs, 3, lambda run, outcome: several.append((run, outcome)))
    measure_runs(runs, 1, lambda run, outcome: single.append((run, outcome)))
    assert several == single
    assert [run for run, _ in several] == runs
    outcomes = {}
    for run, outcome in several:
        outcomes.setdefault((run.setting.name, run.kind.name), []).append(outcome)
    report = build_report(outcomes)
    assert [len(row["accuracies"]) for row in report.values["rows"]] == [2, 2, 2, 2]
    assert "MoE nonlinear | S1 | 99.46 ± 0.55" in report.to_markdown()


def train_briefly(setting, kind, seed, *, stopped):
    return train_and_test(setting, kind, seed, num_examples=64, stopped=stopped)


def test_a_failure_stops_the_other_runs(monkeypatch):
    stopped_runs = []

    def wait_or_fail(setting, kind, seed, *, stopped):
        if seed == 0:
            raise ValueError("first")
        assert stopped.wait(60)
        stopped_runs.append(seed)
        raise TrainingStopped

    monkeypatch.setattr(measure, "train_and_test", wait_or_fail)
    with pytest.raises(ValueError, match="first"):
        measure_runs(list_runs(SETTINGS[:1], KINDS[:1], 2), 2, lambda run, outcome: None)
    assert stopped_runs in ([], [1])  # not begun, or ended by the event


def test_a_stopped_run_ends():
    stopped = threading.Event()
    stopped.set()
    for kind in KINDS:
        with pytest.raises(TrainingStopped):
            train_and_test(SETTINGS[0], kind, 0, num_examples=16, stopped=stopped)


def test_every_published_figure_has_a_model_and_a_setting():
    assert set(PUBLISHED) == {(setting.name, kind.name) for setting in SETTINGS for kind in KINDS}
    outcomes = {("S1", "single linear"): [TrainingOutcome(accuracy=70.0, dispatch_entropy=None)]}
    assert "| single linear | S1 | 68.31 | 70.00 | +1.69 | – | – | 1 |" in build_report(outcomes).to_markdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_published_accuracies_come_out():
    """Two settings, three seeds: 98.9 and 99.99 % with nonlinear experts, 93.3 and 95.9 % with linear ones."""
    outcomes = {}
    runs = list_runs(SETTINGS[2:], KINDS[:2], 3)
    measure_runs(
        runs, 2, lambda run, outcome: outcomes.setdefault((run.setting.name, run.kind.name), []).append(outcome)
    )
    for row in build_report(outcomes).values["rows"]:
        assert abs(row["difference"]) < (1 if row["model"] == "MoE nonlinear" else 3), row
        assert (row["dispatch_entropy"] < 0.3) == (row["model"] == "MoE nonlinear"), row
