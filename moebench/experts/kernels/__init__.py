"""Kernels for grouped matrix products: each says whether it fits, multiplies rows, and computes weight gradients."""
