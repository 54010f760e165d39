"""Trivial baselines of regression on vectors: the mean of the targets, and one linear map."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.measure import EVAL_BATCH, evaluate_outputs

if TYPE_CHECKING:
    from moebench.tasks.task import Batch, Task

TRAINING_SEQUENCES = 1024
TRAINING_SEED = 0
"""Seed and size of the training batch that is fitted: the data have no end."""


def compute_regression_baselines(task: "Task", split: str) -> list[TrivialBaseline]:
    """Return the mean of the training targets and least squares, as mean squared error."""
    train = task.train_batch(TRAINING_SEQUENCES, TRAINING_SEED, 0)
    x_TW, y_TW = (tensor.flatten(0, 1).double() for tensor in (train.input_BL, train.target_BP))
    mean_W = y_TW.mean(0).float()
    solution = np.linalg.lstsq(torch.cat([x_TW, torch.ones_like(x_TW[:, :1])], 1).numpy(), y_TW.numpy(), rcond=None)
    map_XW = torch.from_numpy(solution[0]).float()

    def predict_mean(batch: "Batch") -> torch.Tensor:
        return mean_W.expand_as(batch.target_BP)

    def predict_linear(batch: "Batch") -> torch.Tensor:
        return batch.input_BL @ map_XW[:-1] + map_XW[-1]

    batches = task.eval_batches(split, EVAL_BATCH)
    return [
        TrivialBaseline(
            name="mean",
            meaning="the mean of the training targets",
            values=evaluate_outputs(task, batches, predict_mean),
        ),
        TrivialBaseline(
            name="linear regression",
            meaning="least squares, one map for all clusters",
            values=evaluate_outputs(task, batches, predict_linear),
            is_reference=True,
        ),
    ]
