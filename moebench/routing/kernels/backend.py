"""What computes selections, sorts and all between the matrix products: Triton's kernels, or torch's operators."""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

SWITCH = "MOEBENCH_TRITON"
"""Environment variable: 0 computes with torch's operators where Triton could be used; interpret runs the kernels on a
CPU too, by Triton's interpreter, which is slow (TRITON_INTERPRET=1 must be set when the process starts)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The kernels compute in fp32, so fp64 stays with torch's operators."""
MIN_CAPABILITY = (8, 0)


def uses_triton(tensor: Tensor) -> bool:
    """Return whether Triton's kernels take a tensor: on a GPU, or by the interpreter in tests.

    While a graph is traced the answer is no: the compiler makes kernels of its own from torch's operators.
    """
    if torch.compiler.is_compiling() or tensor.dtype not in DTYPES or not is_installed():
        return False
    if tensor.is_cuda:
        return os.environ.get(SWITCH) != "0" and compiles_kernels(tensor.device)
    return tensor.device.type == "cpu" and os.environ.get(SWITCH) == "interpret"


@functools.cache
def is_installed() -> bool:
    """Return whether the package is there, without importing it, which takes as long as half of torch."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compiles_kernels(device: torch.device) -> bool:
    """Return whether a kernel can be compiled for a GPU, which needs a C compiler; the host does not wait for it."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    from moebench.routing.kernels.gpu import counting_sort

    try:
        counting_sort.sort(torch.zeros(1, dtype=torch.int64, device=device), None, 1)
    except Exception as error:  # whatever the compiler, the driver or the installation raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"Triton compiles no kernel here, torch's operators are used: {reason[-1]}", stacklevel=2)
        return False
    return True
