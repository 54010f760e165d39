"""Benchmark of the MoE layer against a dense layer, other libraries and a plain loop."""
