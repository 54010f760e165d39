"""The learning rate of each update, as a fraction of the peak; `TrainConfig` has the formulas."""

import math
from collections.abc import Callable, Mapping

from moebench.schema import TrainConfig

DECAY_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Progress of the decay, 0 to 1 -> 1 to 0."""


def compute_rate_factor(step: int, train: TrainConfig) -> float:
    """Return the learning rate of an update (counted from 0) as a fraction of the peak."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "inverse_sqrt":
        return math.sqrt(max(train.warmup_steps, 1) / (step + 1))
    shape: str = train.schedule
    start = train.warmup_steps
    if train.schedule == "wsd":
        shape = train.decay_shape
        start = max(start, train.steps - round(train.decay_fraction * train.steps))
    progress = max(step - start, 0) / max(train.steps - start, 1)
    return train.final_rate + (1 - train.final_rate) * DECAY_SHAPES[shape](min(progress, 1.0))
