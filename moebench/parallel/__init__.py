"""Parallel training: mesh, collectives, expert sharding and exchange, gradients, checkpoints for any mesh size."""
