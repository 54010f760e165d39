"""Experiments: from a file to its cells, and running them."""
