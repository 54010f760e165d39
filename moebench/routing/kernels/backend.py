"""Choose what computes selections, sorts and everything between the matrix products: Triton, liger-kernel or torch."""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from moebench.errors import UsageError, build_unknown_error

VARIABLE = "MOEBENCH_KERNELS"
"""Environment variable that names one of `CHOICES`; without it, `auto`."""
CHOICES = {
    "auto": "Triton's kernels on a GPU for which they compile, elsewhere torch's operators",
    "torch": "torch's operators everywhere",
    "triton": "Triton's kernels, on a GPU only",
    "liger": "SwiGLU by the kernels of liger-kernel, everything else by Triton's, on a GPU only",
    "interpret": "Triton's kernels on a CPU by its interpreter, for tests: TRITON_INTERPRET=1 when the process starts",
}
NEEDS_GPU = ("triton", "liger")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The kernels compute in fp32, so fp64 stays with torch's operators."""
MIN_CAPABILITY = (8, 0)


def read_choice() -> str:
    """Return the choice of this process; raise UsageError for an unknown one."""
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise build_unknown_error(VARIABLE, choice, CHOICES)
    return choice


def require_kernels(*, on_gpu: bool) -> None:
    """Raise UsageError if the chosen kernels cannot be used because a package or the GPU is missing."""
    choice = read_choice()
    if choice in NEEDS_GPU and not on_gpu:
        raise UsageError(
            f"{VARIABLE}: '{choice}' was given, and its kernels need a GPU (allowed on a CPU: auto, torch, interpret)"
        )
    if choice in (*NEEDS_GPU, "interpret") and not is_installed("triton"):
        raise UsageError(f"{VARIABLE}: '{choice}' was given, and triton is not installed (allowed: auto, torch)")
    if choice == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            f"{VARIABLE}: 'interpret' was given without TRITON_INTERPRET=1, which Triton reads when it starts"
        )
    if choice == "liger" and not is_installed("liger_kernel"):
        raise UsageError(
            f"{VARIABLE}: 'liger' was given, and liger-kernel is not installed (pip install liger-kernel; allowed"
            " without it: auto, torch, triton)"
        )


def uses_triton(tensor: Tensor) -> bool:
    """Return whether a tensor is computed by kernels in Triton: on a GPU, or by the interpreter in tests.

    False while torch.compile traces a graph: the compiler generates its own kernels from torch's operators. Raises
    UsageError if the choice of this process cannot be used.
    """
    if torch.compiler.is_compiling() or tensor.dtype not in DTYPES or tensor.device.type not in ("cpu", "cuda"):
        return False
    choice = os.environ.get(VARIABLE)
    if not choice and not tensor.is_cuda:  # asked several times in each layer, and a small one takes little longer
        return False
    require_kernels(on_gpu=tensor.is_cuda)
    if not tensor.is_cuda:
        return choice == "interpret"
    has_kernels = choice != "torch" and is_installed("triton") and compiles_kernels(tensor.device)
    if choice in NEEDS_GPU and not has_kernels:
        raise UsageError(f"{VARIABLE}: '{choice}' was given, and Triton compiles no kernel here (allowed: auto, torch)")
    return has_kernels


@functools.cache
def is_installed(module: str) -> bool:
    """Return whether a module is installed, without importing it: triton takes half as long as torch."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def compiles_kernels(device: torch.device) -> bool:
    """Return whether kernels can be compiled for a GPU, which needs a C compiler; does not wait for the device."""
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
