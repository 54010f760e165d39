"""Benchmark of a training step on several processes."""
