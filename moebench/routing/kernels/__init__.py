"""Which kernels compute where tokens go, and those written in Triton."""
