"""Benchmark of the routers."""
