"""Calibration of classifiers: expected calibration error and Brier score, from sums that add up over batches."""

import torch
from torch import Tensor

NUM_BINS = 15


def bin_sums(confidence_B: Tensor, correct_B: Tensor) -> Tensor:
    """Return [B, 3, 15]: 1, confidence and correctness of each image in its bin of confidence, 0 in other bins.

    The bins have equal width and include their lower bound; the last one includes 1.
    """
    inner = torch.linspace(0, 1, NUM_BINS + 1, device=confidence_B.device)[1:-1]
    bin_B = torch.bucketize(confidence_B, inner, right=True)
    value_B3 = torch.stack([torch.ones_like(confidence_B), confidence_B, correct_B.to(confidence_B.dtype)], dim=1)
    in_bin_BX = torch.nn.functional.one_hot(bin_B, NUM_BINS).to(confidence_B.dtype)
    return value_B3.double()[:, :, None] * in_bin_BX.double()[:, None, :]


def calibration_error(sums: Tensor) -> float:
    """Return the expected calibration error Σ_bins n_b / n · |hits_b / n_b - confidence_b / n_b| (arXiv:1706.04599).

    `sums`: the result of `bin_sums`, summed over images: [3, 15].
    """
    number, confidence, hits = sums.double()
    return float((hits - confidence).abs().sum() / number.sum().clamp(min=1))


def brier_B(score_BC: Tensor, one_hot_BC: Tensor) -> Tensor:
    """Return the Brier score Σ_c (p_c - y_c)² of each image, from 0 (certain, correct) to 2 (certain, wrong)."""
    return (score_BC.double() - one_hot_BC.double()).square().sum(-1)
