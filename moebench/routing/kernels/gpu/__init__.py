"""Kernels in Triton, imported only where it is used: one pass over logits or assignments where torch takes several."""
