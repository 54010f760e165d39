"""The FLOPs that training a run took."""

from math import isfinite

from moebench.runs.result import RunResult
from moebench.training.utilization import BACKWARD_FACTOR


def compute_training_flops(result: RunResult) -> float | None:
    """Return the FLOPs of all training steps, forward and backward, as executed; None where they were not measured."""
    flops = result.cost.get("train_flops_per_token", 0.0) * result.cost.get("train_tokens", 0.0)
    factor = result.cost.get("train_factor", BACKWARD_FACTOR)
    return factor * flops if isfinite(flops) and flops > 0 else None
