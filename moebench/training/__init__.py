"""Training one cell: batches, step, evaluation, checkpoints, result."""
