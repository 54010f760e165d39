"""Experiments: the grid, its cells on disk, and the scheduler that runs each cell in its own process."""
