"""Baselines of the tasks on images, recordings and vectors."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.task_data import write_pictures, write_words
from torchmetrics.functional.text import edit_distance

from moebench.config import resolve
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.classification import average_parts, fit_logistic_regression, flatten_patches
from moebench.tasks.baselines.transcription import PaddedTexts, build_answer, choose_transcript
from moebench.tasks.task import Batch, Task
from moebench.training.model import prepare_task

STRINGS = st.text("ab c", max_size=8)


def make_task(folder: Path, name: str, **options: Any) -> Task:
    return prepare_task(resolve({"task": {"name": name, **options}}), folder)


def by_name(task: Task, split: str = "test") -> dict[str, TrivialBaseline]:
    return {baseline.name: baseline for baseline in task.compute_baselines(split)}


def test_logistic_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    x_NF = draw.normal(size=(300, 5)).astype(np.float32)
    label_N = (x_NF @ draw.normal(size=(5, 3)) + draw.normal(size=(300, 3))).argmax(1)
    weight_GK = fit_logistic_regression(x_NF, label_N, 3)
    other = linear_model.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x_NF, label_N)
    logits_NK = x_NF @ weight_GK[:-1] + weight_GK[-1]
    shift_N1 = (logits_NK - other.decision_function(x_NF)).mean(1, keepdims=True)
    assert logits_NK - shift_N1 == pytest.approx(other.decision_function(x_NF), abs=0.02)


def test_majority_and_logistic_regression_of_pictures(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    data = {"path": str(write_pictures(tmp_path / "pictures")), "size": 8}
    baselines = by_name(make_task(tmp_path, "vision", patch=4, data=data))
    # four classes of equally many test images; the classes differ in their grey
    assert baselines["majority class"].values["accuracy"] == 0.25
    assert baselines["logistic regression"].values["accuracy"] > 0.8
    assert baselines["logistic regression"].is_reference


def test_large_images_are_averaged_over_patches():
    batch = Batch(
        input_BL=torch.arange(2 * 4 * 12.0).reshape(2, 4, 12),  # 4 patches of 2 x 2 pixels and 3 channels
        target_BP=torch.zeros(2, 1, dtype=torch.int64),
        weight_BP=torch.ones(2, 1),
        domain_B=torch.zeros(2, dtype=torch.int64),
    )
    assert flatten_patches(batch, 3).shape == (2, 48)
    large = Batch(**{**vars(batch), "input_BL": batch.input_BL.repeat(1, 100, 1)})
    # channel 0 of the first patch has the values 0, 3, 6, 9
    assert flatten_patches(large, 3).shape == (2, 1200)
    assert flatten_patches(large, 3)[0, :3].tolist() == [4.5, 5.5, 6.5]


def test_parts_of_a_recording_are_averaged_without_padding():
    batch = Batch(
        input_BL=torch.tensor([[[float(position)] for position in range(20)]]),
        target_BP=torch.zeros(1, 1, dtype=torch.int64),
        weight_BP=torch.ones(1, 1),
        domain_B=torch.zeros(1, dtype=torch.int64),
        valid_BL=(torch.arange(20) < 16)[None],
    )
    # 16 positions in 8 parts: 0 and 1, 2 and 3, ...
    assert average_parts(batch).tolist() == [[0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]]


def test_keywords_have_baselines(tmp_path: Path):
    data = {"path": str(write_words(tmp_path / "words"))}
    baselines = by_name(make_task(tmp_path, "keyword", data=data))
    assert 0 <= baselines["majority class"].values["accuracy"] <= 0.5
    assert 0 <= baselines["logistic regression"].values["accuracy"] <= 1


@given(answer=STRINGS, texts=st.lists(STRINGS, min_size=1, max_size=5))
def test_edit_distances_are_those_of_torchmetrics(answer: str, texts: list[str]):
    expected = [int(edit_distance([answer], [text], reduction="none")[0]) for text in texts]
    assert PaddedTexts(texts).count_errors(answer).tolist() == expected


def test_the_best_constant_answers_by_hand():
    texts = ["ab", "ab", "abc", "xyz"]
    sample = PaddedTexts(texts)
    # errors of ab: 0, 0, 1, 3; abc: 1, 1, 0, 3; xyz: 3, 3, 3, 0 of 10 characters
    assert choose_transcript(texts, sample) == "ab"
    assert sample.compute_error_rate("ab") == 0.4
    assert build_answer(texts, sample) == "ab"
    assert sample.compute_error_rate("") == 1.0


def test_constant_transcripts_of_recordings(tmp_path: Path):
    task: Any = make_task(tmp_path, "speech", data={"path": str(write_words(tmp_path / "words"))})
    baselines = by_name(task)
    assert [baseline.is_reference for baseline in baselines.values()].count(True) == 1
    texts = [task._text(row) for batch in task.eval_batches("test", 8) for row in batch.target_BP.tolist()]
    answer = baselines["constant transcript"].meaning.split("'")[1]
    errors = [int(edit_distance([answer], [text], reduction="none")[0]) for text in texts]
    values = baselines["constant transcript"].values
    assert values["cer"] == pytest.approx(sum(errors) / sum(map(len, texts)))
    assert values["wer"] == pytest.approx(sum(answer != text for text in texts) / len(texts))


def test_the_mean_and_a_linear_map_of_vectors(tmp_path: Path):
    task: Any = make_task(tmp_path, "clustered", num_clusters=1, noise=0.0)
    baselines = by_name(task)
    (batch,) = task.eval_batches("test", 8)
    deviation = (batch.target_BP - task.train_batch(1024, 0, 0).target_BP.mean((0, 1))).square().mean()
    assert baselines["mean"].values["mse"] == pytest.approx(float(deviation), rel=1e-5)
    # one cluster is one linear map
    assert baselines["linear regression"].values["mse"] == pytest.approx(0, abs=1e-9)
    assert by_name(make_task(tmp_path, "clustered"))["linear regression"].values["mse"] > 0.5


def test_tasks_have_one_reference_each(tmp_path: Path):
    counts = Counter(baseline.is_reference for baseline in make_task(tmp_path, "clustered").compute_baselines("test"))
    assert counts[True] == 1
