"""Estimate the disk space of the checkpoints of cells before they are trained."""

from moebench.experiment.model_costs import ModelCosts
from moebench.schema import CellConfig

BYTES_PER_WEIGHT = 4
CHECKPOINT_BYTES_PER_PARAM = 3 * BYTES_PER_WEIGHT
"""fp32 weight and two moments of AdamW."""
EXTRA_CHECKPOINTS = 2
"""A finished cell keeps one checkpoint; one that trains keeps two and writes a third before it drops the oldest."""


def count_checkpoint_bytes(config: CellConfig, costs: ModelCosts) -> int:
    """Return the bytes of one checkpoint of a cell."""
    return CHECKPOINT_BYTES_PER_PARAM * costs.facts(config).cost.total_params


def count_kept_bytes(config: CellConfig, costs: ModelCosts) -> int:
    """Return the bytes of the weights that stay beside the last checkpoint (`train.keep_checkpoints`)."""
    return BYTES_PER_WEIGHT * costs.facts(config).cost.total_params * len(config.train.kept_steps)


def count_disk_bytes(config: CellConfig, costs: ModelCosts) -> int:
    """Return the bytes of checkpoints that a finished cell leaves on the disk."""
    return count_checkpoint_bytes(config, costs) + count_kept_bytes(config, costs)
