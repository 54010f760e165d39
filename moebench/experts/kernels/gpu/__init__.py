"""Kernels in Triton, imported only where it is used: one pass over memory where torch's operators take several."""
