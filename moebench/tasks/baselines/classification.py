"""Trivial baselines of classification: the majority class, and logistic regression on the input."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.measure import EVAL_BATCH, Values, evaluate_outputs, keep_metrics

if TYPE_CHECKING:
    from moebench.tasks.task import Batch, Task

MAX_TRAINING_SAMPLES = 20_000
MAX_FEATURE_BYTES = 1 << 28
"""Memory of the features of the training samples, which are fewer where a sample is large."""
INVERSE_PENALTY = 1.0
"""C of scikit-learn's `LogisticRegression`, at its default."""
MAX_ITERATIONS = 100
"""Iterations of L-BFGS, as in scikit-learn."""
MAX_PIXELS = 4096
"""Largest image that is read pixel by pixel; of a larger one, the linear model reads the mean of each patch."""
NUM_PARTS = 8
"""Parts of a recording whose mean features the linear model reads."""


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """What the baselines of a task of classification are computed from."""

    task: "Task"
    num_classes: int
    batches: Iterable["Batch"]
    """Training samples, unaugmented; as many as are used."""
    num_used: int
    """Number of these samples."""
    read_features: Callable[["Batch"], Tensor]
    """Returns the input x_BF of the linear model for a batch."""
    spread_logits: Callable[[Tensor, "Batch"], Tensor]
    """Returns the output that the task's metric reads for the logits [B, K] of a batch."""
    feature_name: str


class ClassBaselines:
    """The majority class and logistic regression, fitted once for both splits."""

    def __init__(self, problem: ClassificationData) -> None:
        self.problem = problem
        pairs = [(problem.read_features(batch).numpy(), batch.target_BP[:, 0].numpy()) for batch in problem.batches]
        x_NF, label_N = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        self._mean_F, self._scale_F = x_NF.mean(0), np.maximum(x_NF.std(0), 1e-6)
        self._weight_GK = fit_logistic_regression(self._standardise(x_NF), label_N, problem.num_classes)
        majority = int(np.bincount(label_N).argmax())
        self._one_hot_K = torch.nn.functional.one_hot(torch.tensor(majority), problem.num_classes).float()

    def evaluate(self, split: str) -> list[TrivialBaseline]:
        """Return both baselines, as accuracy on the evaluation set of a split."""
        task, spread = self.problem.task, self.problem.spread_logits

        def predict_majority(batch: "Batch") -> Tensor:
            return spread(self._one_hot_K.expand(len(batch.domain_B), -1), batch)

        def predict_linear(batch: "Batch") -> Tensor:
            x_BF = self._standardise(self.problem.read_features(batch).numpy())
            return spread(torch.from_numpy(_append_one(x_BF) @ self._weight_GK), batch)

        batches = task.eval_batches(split, EVAL_BATCH)
        majority, linear = (
            keep_metrics(evaluate_outputs(task, batches, predict), ["accuracy"])
            for predict in (predict_majority, predict_linear)
        )
        data = f"{self.problem.feature_name} of {self.problem.num_used:,} training samples"
        return [
            TrivialBaseline(
                name="majority class", meaning="the most frequent class of the training split", values=majority
            ),
            TrivialBaseline(
                name="logistic regression",
                meaning=f"on {data}, L2 penalty with C = 1",
                values=linear,
                is_reference=True,
            ),
        ]

    def _standardise(self, x_NF: Values) -> Values:
        scaled_NF: Values = (x_NF - self._mean_F) / self._scale_F
        return scaled_NF


def limit_samples(num_samples: int, num_features: int) -> int:
    """Return how many training samples are used."""
    return min(num_samples, MAX_TRAINING_SAMPLES, max(MAX_FEATURE_BYTES // (4 * num_features), 1000))


def fit_logistic_regression(x_NF: Values, label_N: Values, num_classes: int) -> Values:
    """Return the weights [F + 1, K] of multinomial logistic regression, the last row for the constant.

    Minimises the mean negative log-likelihood plus |W|² / (2 C N) without the constant, the objective of scikit-learn's
    `LogisticRegression`, by L-BFGS from zero.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    x_NG = _append_one(x_NF.astype(np.float32))
    num_samples, shape = len(x_NG), (x_NG.shape[1], num_classes)
    penalty = 1 / (INVERSE_PENALTY * num_samples)
    penalty_G1 = np.full((shape[0], 1), penalty)
    penalty_G1[-1] = 0

    def compute_loss(flat: Values) -> tuple[float, Values]:
        weight_GK = flat.reshape(shape)
        logp_NK = log_softmax((x_NG @ weight_GK.astype(np.float32)).astype(np.float64), axis=1)
        residual_NK = np.exp(logp_NK)
        residual_NK[np.arange(num_samples), label_N] -= 1
        slope_GK = (x_NG.T @ residual_NK.astype(np.float32)).astype(np.float64) / num_samples + penalty_G1 * weight_GK
        loss = -logp_NK[np.arange(num_samples), label_N].mean() + 0.5 * (penalty_G1 * weight_GK**2).sum()
        return float(loss), slope_GK.ravel()

    start = np.zeros(shape[0] * shape[1])
    solution = minimize(compute_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS})
    weight_GK: Values = solution.x.reshape(shape).astype(np.float32)
    return weight_GK


def _append_one(x_NF: Values) -> Values:
    return np.concatenate([x_NF, np.ones_like(x_NF[:, :1])], axis=1)


def flatten_patches(batch: "Batch", num_channels: int) -> Tensor:
    """Return the pixels of images x_BF, or the mean of each patch and channel if they are more than `MAX_PIXELS`."""
    x_BLX = batch.input_BL
    if x_BLX[0].numel() > MAX_PIXELS:
        x_BLX = x_BLX.reshape(*x_BLX.shape[:2], -1, num_channels).mean(2)
    return x_BLX.flatten(1)


def average_parts(batch: "Batch") -> Tensor:
    """Return the mean input of `NUM_PARTS` equal parts of each sequence without its padding, x_BF."""
    assert batch.valid_BL is not None
    x_BLX, length_B1 = batch.input_BL, batch.valid_BL.sum(1, keepdim=True)
    part_BL = (torch.arange(x_BLX.shape[1]) * NUM_PARTS // length_B1).clamp(max=NUM_PARTS - 1)
    is_in_BLN = torch.nn.functional.one_hot(part_BL, NUM_PARTS) * batch.valid_BL[:, :, None]
    sum_BNX = is_in_BLN.float().transpose(1, 2) @ x_BLX
    return (sum_BNX / is_in_BLN.sum(1).clamp(min=1)[:, :, None]).flatten(1)
