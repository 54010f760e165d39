"""Few-shot probe: accuracy of a linear classifier on frozen features for classes that training never saw."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.ranges import AT_LEAST_1, POSITIVE, Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Options of the few-shot probe; it needs task.data.held_out_classes."""

    RANGES: ClassVar[Mapping[str, Range]] = {"draws": AT_LEAST_1, "ridge": POSITIVE}

    shots: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Training images per held-out class; one metric few_shot/K for each number K."""
    draws: int = 5
    """Disjoint sets of training images; the metric is the mean over them."""
    ridge: float = 0.1
    """Regularisation, in units of the mean squared norm of the centred features."""

    def __post_init__(self) -> None:
        is_unique = len(set(self.shots)) == len(self.shots) and all(shots >= 1 for shots in self.shots)
        require(is_unique, "task.few_shot.shots", self.shots, "a list of different numbers of at least 1")
        check_ranges(self, "task.few_shot")


def ridge_predictions(x_SD: Tensor, label_S: Tensor, x_QD: Tensor, num_classes: int, ridge: float) -> Tensor:
    """Return the class (int64) of each query by ridge regression of one-hot labels on the support's features.

    W = argmin Σ |x W - y|² + λ |W|² on centred x and y, in closed form by its S × S dual:
    W = Xᵀ (X Xᵀ + λ I)⁻¹ Y, where λ is `ridge` times the mean squared norm of a row of X. In fp64.
    ViT (arXiv:2010.11929) measures few-shot accuracy by such a regression.
    """
    x_SD, x_QD = x_SD.double(), x_QD.double()
    mean_D = x_SD.mean(0)
    x_SD, x_QD = x_SD - mean_D, x_QD - mean_D
    y_SC = functional.one_hot(label_S, num_classes).double()
    kernel_SS = x_SD @ x_SD.mT
    strength = (ridge * kernel_SS.diagonal().mean()).clamp(min=1e-12)
    dual_SC = torch.linalg.solve(kernel_SS + strength * torch.eye(len(x_SD), dtype=x_SD.dtype), y_SC - y_SC.mean(0))
    scores_QC: Tensor = x_QD @ x_SD.mT @ dual_SC + y_SC.mean(0)
    return scores_QC.argmax(-1)


def few_shot_accuracy(support_CND: Tensor, x_QD: Tensor, label_Q: Tensor, config: FewShotConfig) -> dict[str, float]:
    """Return few_shot/K for each number of shots, the mean over draws.

    `support_CND` has draws · max(shots) images per class; draw i uses those from i · max(shots) onwards.
    """
    num_classes, largest = support_CND.shape[0], max(config.shots, default=0)
    accuracy = {}
    for shots in config.shots:
        hits = []
        for draw in range(config.draws):
            x_CKD = support_CND[:, draw * largest : draw * largest + shots]
            label_S = torch.arange(num_classes).repeat_interleave(shots)
            predicted_Q = ridge_predictions(x_CKD.flatten(0, 1), label_S, x_QD, num_classes, config.ridge)
            hits.append((predicted_Q == label_Q).double().mean())
        accuracy[f"few_shot/{shots}"] = float(torch.stack(hits).mean())
    return accuracy
