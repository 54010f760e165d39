"""Kernels in Triton, imported only if they are used: one pass over logits or assignments where torch takes several."""
