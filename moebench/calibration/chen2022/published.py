"""Figures of Chen et al. 2022: test accuracy in percent, from the outputs of the notebooks of github.com/uclaml/MoE.

Mixtures: mean, standard deviation (of the population) and dispatch entropy of 10 runs on one data set. Single networks:
one run each, without a standard deviation.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published figures of one model in one setting."""

    accuracy: float
    std: float | None = None
    dispatch_entropy: float | None = None


def _mixture(accuracy: float, std: float, dispatch_entropy: float) -> Published:
    return Published(accuracy=accuracy, std=std, dispatch_entropy=dispatch_entropy)


PUBLISHED: dict[tuple[str, str], Published] = {
    ("S1", "MoE nonlinear"): _mixture(99.46, 0.55, 0.098),
    ("S2", "MoE nonlinear"): _mixture(98.10, 1.56, 0.183),
    ("S3", "MoE nonlinear"): _mixture(99.99, 0.02, 0.008),
    ("S4", "MoE nonlinear"): _mixture(98.92, 1.18, 0.089),
    ("S1", "MoE linear"): _mixture(93.00, 2.11, 1.300),
    ("S2", "MoE linear"): _mixture(89.49, 1.35, 1.262),
    ("S3", "MoE linear"): _mixture(95.93, 1.34, 1.160),
    ("S4", "MoE linear"): _mixture(93.30, 1.48, 1.160),
    ("S1", "single nonlinear"): Published(accuracy=79.57),
    ("S2", "single nonlinear"): Published(accuracy=77.38),
    ("S3", "single nonlinear"): Published(accuracy=73.72),
    ("S4", "single nonlinear"): Published(accuracy=70.26),
    ("S1", "single linear"): Published(accuracy=68.31),
    ("S2", "single linear"): Published(accuracy=68.22),
    ("S3", "single linear"): Published(accuracy=74.30),
    ("S4", "single linear"): Published(accuracy=74.28),
}
"""(setting, model) -> figures."""
