"""The z-loss of the output, which keeps its logits from drifting (PaLM, arXiv:2204.02311, section 5)."""

from collections.abc import Sequence

import torch

from moebench.tasks.deferred_logits import ModelOutput, compute_log_z
from moebench.tasks.task import Batch
from moebench.training.objective import LossNormalizer, Objective

NAME = "output_z"
"""Name in the journal; `z` is that of routers."""


def add_z_loss(
    objective: Objective, coefficient: float, outputs: Sequence[ModelOutput], batch: Batch, normalizer: LossNormalizer
) -> Objective:
    """Return the loss with coefficient · mean(log² Z), Z = Σ_v exp(logit_v), over predictions and passes.

    `outputs`: the logits of each pass. A coefficient of 0 adds nothing, not even a measurement.
    """
    if coefficient == 0:
        return objective
    raw = [normalizer.mean_over_outputs(compute_log_z(output).square(), batch) for output in outputs]
    return objective.add(NAME, torch.stack(raw).mean(), coefficient)
