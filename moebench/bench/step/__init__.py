"""Benchmark of a training step and of its parts."""
