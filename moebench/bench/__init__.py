"""Benchmarks: the layer and the training step against a dense twin and other libraries, timed in one run."""
