"""Kernels for grouped matrix products: each checks whether it applies, multiplies rows, computes weight gradients."""
