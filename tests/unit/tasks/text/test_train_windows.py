"""`task.train_windows`: a fixed sample of the training split, the smaller one inside the larger one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_experiment import write_text

from moebench.config import cell_id, resolve
from moebench.errors import UsageError
from moebench.experiment.data_need import compute_data_need
from moebench.tasks.language import TextTask
from moebench.tasks.text.windows import select_windows
from moebench.training.model import prepare_task


def open_task(folder: Path, **options: Any) -> TextTask:
    write_text(folder / "text") if not (folder / "text").exists() else None
    data = {"path": str(folder / "text"), "tokenizer": "bytes"}
    raw = {"task": {"name": "language", "sequence_length": 16, "eval_windows": 4, "data": data, **options}}
    task = prepare_task(resolve(raw), folder)
    assert isinstance(task, TextTask)
    return task


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    small, large = select_windows(1000, 10), select_windows(1000, 100)
    assert small is not None
    assert large is not None
    assert small.tolist() == large[:10].tolist()
    assert len(set(large.tolist())) == 100
    assert large.min() >= 0
    assert large.max() < 1000
    assert select_windows(1000, None) is None


def test_every_seed_trains_on_the_same_windows_in_its_own_order(tmp_path: Path) -> None:
    task = open_task(tmp_path, train_windows=6)
    assert task.count_train_samples() == 6
    orders = [[index for step in range(3) for index in task.list_train_samples(2, seed, step)] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(select_windows(task.text.train.num_windows, 6).tolist())  # type: ignore[union-attr]
    assert orders[0] != orders[1]
    batch = task.train_batch(6, 0, 0)
    windows = task.text.train.window(np.array(task.list_train_samples(6, 0, 0)))[0]
    assert batch.input_BL.tolist() == windows[:, :-1].tolist()


def test_tables_from_the_training_text_see_the_sample_alone(tmp_path: Path) -> None:
    task, whole = open_task(tmp_path, train_windows=3), open_task(tmp_path)
    assert int(task.token_count_V.sum()) == 3 * 17
    assert int(task.token_pairs().sum()) == 3 * 16
    assert task.eval_digest == whole.eval_digest


def test_more_windows_than_there_are_is_one_line(tmp_path: Path) -> None:
    num_windows = open_task(tmp_path).count_train_samples()
    with pytest.raises(UsageError, match=f"task.train_windows must be at most {num_windows}"):
        open_task(tmp_path, train_windows=num_windows + 1)


def test_a_small_sample_may_be_repeated(tmp_path: Path) -> None:
    task = open_task(tmp_path, train_windows=2)
    config = resolve({"task": {"name": "language", "train_windows": 2}, "train": {"steps": 100, "batch_size": 2}})
    need = compute_data_need(config, task)
    assert need is not None
    assert need.epochs == 100
    assert need.max_epochs == float("inf")


def test_null_leaves_the_id_as_it_was() -> None:
    plain, null, some = (
        resolve({"task": {"name": "language", **options}})
        for options in ({}, {"train_windows": None}, {"train_windows": 250})
    )
    assert cell_id(plain, "x") == cell_id(null, "x")
    assert cell_id(some, "x") != cell_id(null, "x")
