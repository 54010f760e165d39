"""`train.skip_batches`: training begins later in the order of the data."""

import dataclasses

import pytest
import torch

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.parallel.mesh import SINGLE_PROCESS_MESH
from moebench.tasks.task import TASKS
from moebench.training.batches import BatchSource, count_train_tokens

SETTINGS = {"task": {"name": "clustered"}, "train": {"steps": 4, "batch_size": 4, "skip_batches": 3}}


def test_step_0_reads_the_batch_after_those_that_are_skipped() -> None:
    config = resolve(SETTINGS)
    task = TASKS.get("clustered").item(config.task)
    source = BatchSource(config=config, task=task, mesh=SINGLE_PROCESS_MESH)
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, skip_batches=0))
    parent = BatchSource(config=first, task=task, mesh=SINGLE_PROCESS_MESH)
    for step in range(2):
        (batch,), (expected,) = source.make_micro_batches(step), parent.make_micro_batches(step + 3)
        assert torch.equal(batch.input_BL, expected.input_BL)
    assert source.name_batch(0) == parent.name_batch(3)
    assert count_train_tokens(config, task) == count_train_tokens(first, task)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(UsageError, match="skip_batches"):
        resolve({"train": {"skip_batches": -1}})
