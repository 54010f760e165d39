"""The vision task: patches, augmentation, metrics, held-out classes, and training with every kind of layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.case_selection import combine_axes
from support.task_data import write_pictures
from support.training_cases import Run

from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.models.transformer import init_weights
from moebench.tasks.images.augment import Augmentation
from moebench.tasks.images.calibration import NUM_BINS, bin_sums, brier_B, calibration_error
from moebench.tasks.images.few_shot import FewShotConfig, few_shot_accuracy, ridge_predictions
from moebench.tasks.images.patches import ClassHead, PatchEmbedding, extract_patches
from moebench.tasks.task import Batch
from moebench.tasks.vision import Vision

TINY: dict[str, Any] = {
    "task": {"name": "vision", "patch": 4, "data": {"size": 8}},
    "model": {"d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_width": 16},
    "layout": {"name": "every_n", "n": 1, "num_experts": 4, "expert_width": 8},
    "train": {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 100,
        "device": "cpu",
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def tiny(pictures: Path, **changes: Any) -> Any:
    return resolve(merge_settings(merge_settings(TINY, {"task": {"data": {"path": str(pictures)}}}), changes))


def task_of(pictures: Path, tmp_path: Path, **options: Any) -> Vision:
    return Vision.prepare(tiny(pictures, task=options).task, tmp_path / "cache")


def test_patches_by_hand() -> None:
    pixel_BHWC = torch.arange(2 * 4 * 4 * 3).view(2, 4, 4, 3)
    patches = extract_patches(pixel_BHWC, 2)
    assert patches.shape == (2, 4, 12)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                by_hand = [
                    pixel_BHWC[image, 2 * row + y, 2 * column + x, c].item()
                    for y in range(2) for x in range(2) for c in range(3)
                ]  # fmt: skip
                assert patches[image, 2 * row + column].tolist() == by_hand


@pytest.mark.parametrize("with_class_token", [False, True])
def test_embedding_by_hand(with_class_token: bool) -> None:
    embedding = PatchEmbedding(4, 12, 6, with_class_token=with_class_token)
    init_weights(embedding, 0)
    patch_BLX = torch.randn(2, 4, 12)
    x_BLD = embedding(patch_BLX)
    assert x_BLD.shape == (2, 4 + with_class_token, 6)
    if with_class_token:
        assert torch.equal(x_BLD[0, 0], x_BLD[1, 0])  # it has seen nothing yet
        assert torch.equal(x_BLD[0, 0], embedding.place_LD[0])
    by_hand = embedding.linear.weight @ patch_BLX[1, 2] + embedding.place_LD[2 + with_class_token]
    torch.testing.assert_close(x_BLD[1, 2 + with_class_token], by_hand)


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_the_head_starts_uniform_and_reads_the_pooled_vector(pooling: str) -> None:
    head = ClassHead(6, 3, pooling)
    init_weights(head, 0)
    x_BLD = torch.randn(2, 5, 6)
    assert torch.equal(head(x_BLD), torch.zeros(2, 3))
    torch.nn.init.normal_(head.linear.weight)
    read_BD = x_BLD.mean(1) if pooling == "mean" else x_BLD[:, 0]
    torch.testing.assert_close(head(x_BLD), read_BD @ head.linear.weight.T)


def test_augmentation_by_hand() -> None:
    pixel_BHWC = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    change = Augmentation(shift_B2=np.array([[1, 0]]), mirrored_B=np.array([False]))
    assert change(pixel_BHWC)[0, :, :, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]  # one down
    change = Augmentation(shift_B2=np.array([[0, -1]]), mirrored_B=np.array([True]))
    assert change(pixel_BHWC)[0, :, :, 0].tolist() == [[2, 1, 0], [5, 4, 0], [8, 7, 0]]  # mirrored, one left


def test_a_training_batch_is_a_function_of_seed_and_step(pictures: Path, tmp_path: Path) -> None:
    task = task_of(pictures, tmp_path, shift=2, mirror=["all"])
    ours, again = task.train_batch(4, 0, 7), task_of(pictures, tmp_path, shift=2, mirror=["all"]).train_batch(4, 0, 7)
    assert torch.equal(ours.input_BL, again.input_BL)
    assert torch.equal(ours.target_BP, again.target_BP)
    for seed, step in ((0, 8), (1, 7)):
        assert not torch.equal(ours.input_BL, task.train_batch(4, seed, step).input_BL)
    # The parts of several processes make up the whole batch.
    parts = [task.train_batch(4, 0, 7, slice(start, start + 2)) for start in (0, 2)]
    assert torch.equal(torch.cat([part.input_BL for part in parts]), ours.input_BL)
    # The draws move pictures: with none allowed the batch is another, and then the same in every epoch but for order.
    plain = task_of(pictures, tmp_path, shift=0).train_batch(4, 0, 7)
    assert torch.equal(plain.target_BP, ours.target_BP)
    assert not torch.equal(plain.input_BL, ours.input_BL)


def test_draws_cover_all_shifts_evenly_and_mirror_half() -> None:
    drawn = Augmentation.draw(20000, 2, 0, 0)
    shares = np.bincount(drawn.shift_B2.reshape(-1) + 2, minlength=5) / 40000
    assert np.abs(shares - 0.2).max() < 0.01  # five SD of a share are 0.01
    assert abs(drawn.mirrored_B.mean() - 0.5) < 0.02


def test_only_fashion_is_mirrored_by_default(pictures: Path, tmp_path: Path) -> None:
    assert not task_of(pictures, tmp_path).mirror_D.any()
    assert task_of(pictures, tmp_path, mirror=["all"]).mirror_D.all()
    with pytest.raises(UsageError, match=r"task\.mirror: 'al' is unknown\. Did you mean 'all'"):
        task_of(pictures, tmp_path, mirror=["al"])


def test_calibration_error_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    draw = torch.Generator().manual_seed(0)
    score_BC = (3 * torch.randn(500, 5, generator=draw)).softmax(-1)
    target_B = torch.randint(5, (500,), generator=draw)
    confidence_B, predicted_B = score_BC.max(-1)
    sums = bin_sums(confidence_B, predicted_B == target_B).sum(0)
    expected = multiclass_calibration_error(score_BC, target_B, num_classes=5, n_bins=NUM_BINS, norm="l1")
    assert calibration_error(sums) == pytest.approx(expected.item(), abs=1e-6)


def test_calibration_by_hand() -> None:
    # In the bin [0.6, 0.667): two of confidence 0.65 and 0.61, one right: |1 - 1.26|; at 1.0, one right, one wrong: 1.
    confidence_B = torch.tensor([0.65, 0.61, 1.0, 1.0])
    correct_B = torch.tensor([True, False, True, False])
    assert calibration_error(bin_sums(confidence_B, correct_B).sum(0)) == pytest.approx((0.26 + 1) / 4, abs=1e-6)
    score_BC = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert brier_B(score_BC, torch.tensor([[1, 0]] * 3)).tolist() == [0, 0.5, 2]


def test_metrics_by_hand(pictures: Path, tmp_path: Path) -> None:
    task = task_of(pictures, tmp_path)
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 3.0, 0], [1.0, 0, 0, 0]])
    target_BP = torch.tensor([[0], [2], [3]])
    zeros_B = torch.zeros(3, dtype=torch.int64)
    batch = Batch(input_BL=torch.zeros(3, 4, 16), target_BP=target_BP, weight_BP=target_BP * 0 + 1, domain_B=zeros_B)
    sums = {name: value.double().sum(0, keepdim=True) for name, value in task.compute_sums(logits, batch).items()}
    quality = task.compute_quality(sums)
    assert quality["accuracy"] == quality["accuracy/all"] == pytest.approx(2 / 3)
    nats = -logits.log_softmax(-1)[torch.arange(3), target_BP[:, 0]].mean().item()
    assert quality["nats"] == pytest.approx(nats, rel=1e-6)
    assert {name: value for name, value in quality.items() if name.startswith("class_")} == {
        "class_accuracy/class0": 1, "class_accuracy/class2": 1, "class_accuracy/class3": 0,
    }  # fmt: skip
    assert task.loss(logits, batch).mean().item() == pytest.approx(nats, rel=1e-6)


def test_smoothing_is_in_the_loss_and_not_in_the_metric(pictures: Path, tmp_path: Path) -> None:
    task, plain = task_of(pictures, tmp_path, label_smoothing=0.2), task_of(pictures, tmp_path)
    batch = plain.train_batch(4, 0, 0)
    output = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    log_BC, target_B = output.log_softmax(-1), batch.target_BP[:, 0]
    by_hand_B = -(0.8 * log_BC[torch.arange(4), target_B] + 0.2 * log_BC.mean(-1))
    torch.testing.assert_close(task.loss(output, batch)[:, 0], by_hand_B)
    assert torch.equal(task.compute_sums(output, batch)["nats"], plain.compute_sums(output, batch)["nats"])


def test_held_out_classes_are_nowhere_in_training_and_evaluation(pictures: Path, tmp_path: Path) -> None:
    options = {"data": {"held_out_classes": [1, 3]}, "few_shot": {"shots": [1, 2], "draws": 2}}
    task, full = task_of(pictures, tmp_path, **options), task_of(pictures, tmp_path)
    assert task.class_of_K.tolist() == [0, 2]
    assert task.build_head(8).linear.out_features == 2
    seen = {target for step in range(20) for target in task.train_batch(4, 0, step).target_BP[:, 0].tolist()}
    assert seen == {0, 1}  # outputs of the head, for classes 0 and 2
    for split in ("validation", "test"):
        ours = sum(len(batch.domain_B) for batch in task.eval_batches(split, 3))
        assert ours * 2 == sum(len(batch.domain_B) for batch in full.eval_batches(split, 3))
    assert task.eval_digest != full.eval_digest
    assert task.digest != full.digest
    for wrong, words in (([4], "from 0 to 3"), ([0, 1, 2], "at least two")):
        with pytest.raises(UsageError, match=rf"task\.data\.held_out_classes .*{words}"):
            task_of(pictures, tmp_path, data={"held_out_classes": wrong})
    with pytest.raises(UsageError, match=r"5 draws of 10 images need 50 of class 'class1', which has 16"):
        task_of(pictures, tmp_path, data={"held_out_classes": [1]})


def test_ridge_is_the_regression_of_the_normal_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    x_SD, x_QD = (torch.randn(size, 4, generator=draw, dtype=torch.float64) for size in (12, 30))
    label_S = torch.arange(3).repeat(4)
    mean_D = x_SD.mean(0)
    centred_SD = x_SD - mean_D
    strength = 0.1 * centred_SD.square().sum(1).mean()
    y_SC = torch.nn.functional.one_hot(label_S, 3).double()
    weight_DC = torch.linalg.solve(
        centred_SD.T @ centred_SD + strength * torch.eye(4, dtype=torch.float64), centred_SD.T @ (y_SC - y_SC.mean(0))
    )
    expected_Q = ((x_QD - mean_D) @ weight_DC + y_SC.mean(0)).argmax(-1)
    assert torch.equal(ridge_predictions(x_SD, label_S, x_QD, 3, 0.1), expected_Q)


def test_the_probe_separates_distant_classes() -> None:
    draw = torch.Generator().manual_seed(0)
    centre_CD = 5 * torch.eye(3, 6)
    support_CND = centre_CD[:, None] + torch.randn(3, 10, 6, generator=draw)
    label_Q = torch.arange(3).repeat(50)
    x_QD = centre_CD[label_Q] + torch.randn(150, 6, generator=draw)
    accuracy = few_shot_accuracy(support_CND, x_QD, label_Q, FewShotConfig(shots=[1, 5], draws=2))
    assert accuracy["few_shot/5"] > 0.95
    shuffled = few_shot_accuracy(support_CND, x_QD, label_Q.roll(1), FewShotConfig(shots=[5], draws=2))
    assert shuffled["few_shot/5"] < 0.1
    same = few_shot_accuracy(torch.ones(3, 4, 6), x_QD, label_Q, FewShotConfig(shots=[2], draws=2))
    assert same["few_shot/2"] == pytest.approx(1 / 3)  # nothing distinguishes them


LAYOUTS = {
    "every_n": {},
    "last_n": {"n": 1, "capacity_factor_train": 1.0, "capacity_factor_eval": 0.5, "capacity_rule": "vmoe"},
    "attention": {"match": "none", "expert_width": None},
    "whole_model": {},
}


@pytest.mark.parametrize(
    ("router", "layout"),
    combine_axes(["v_moe", "dense"], [*LAYOUTS], quick=[("dense", "every_n"), *(("v_moe", name) for name in LAYOUTS)]),
)
def test_training_runs_with_every_kind_of_layout(pictures: Path, tmp_path: Path, layout: str, router: str) -> None:
    options = {"name": layout, "num_experts": 4, "expert_width": 8} | LAYOUTS[layout]
    run = Run(tiny(pictures, layout=options, router=router, task={"pooling": "class_token"}), tmp_path)
    result = run()
    assert result is not None
    assert result.marks == ()
    assert 0 <= result.metrics["accuracy"] <= 1
    assert {"nats", "brier", "ece", "accuracy/all", "class_accuracy/class0"} <= set(result.metrics)
    assert result.cost["train_tokens"] == 6 * 4 * 5  # 4 patches and the class token
    if router == "v_moe" and layout == "last_n":
        assert result.metrics["load/drop_rate"] > 0


@pytest.mark.parametrize(
    "router", ["expert_choice", *(pytest.param(name, marks=pytest.mark.slow) for name in ("soft_moe", "switch"))]
)
def test_routers_that_see_the_whole_image_are_not_marked(pictures: Path, tmp_path: Path, router: str) -> None:
    result = Run(tiny(pictures, router=router), tmp_path)()
    assert result is not None
    assert result.marks == ()


def test_a_run_learns_and_its_features_separate_new_classes(pictures: Path, tmp_path: Path) -> None:
    options = {"data": {"held_out_classes": [1, 3]}, "few_shot": {"shots": [1, 4], "draws": 2}}
    train = {"steps": 60, "batch_size": 8, "learning_rate": 0.01}
    result = Run(tiny(pictures, router="switch", task=options, train=train), tmp_path)()
    assert result is not None
    assert result.metrics["accuracy"] == 1  # greys that do not overlap
    assert {name for name in result.metrics if name.startswith("few_shot/")} == {"few_shot/1", "few_shot/4"}
    assert result.metrics["few_shot/4"] > 0.5


def test_wrong_options_are_refused() -> None:
    for options, words in (
        ({"patch": 5}, r"task\.patch must be a divisor of task\.data\.size=28 \(1, 2, 4, 7, 14, 28\), got 5"),
        ({"shift": -1}, r"task\.shift must be at least 0"),
        ({"label_smoothing": 1.0}, r"task\.label_smoothing must be at least 0 and below 1"),
        ({"eval_images": 0}, r"task\.eval_images must be at least 1"),
        ({"few_shot": {"draws": 0}}, r"task\.few_shot\.draws must be at least 1"),
        ({"data": {"sources": ["cifar"]}}, r"task\.data\.sources: 'cifar' is unknown"),
        ({"pooling": "max"}, r"task\.pooling"),
    ):
        with pytest.raises(UsageError, match=words):
            resolve({"task": {"name": "vision", **options}})
