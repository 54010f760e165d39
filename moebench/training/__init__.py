"""Training one cell: model, step, evaluation, checkpoints, the worker process."""
