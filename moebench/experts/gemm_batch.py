"""Matrix products of different sizes in one call: the batched GEMM of the MKL that torch's x86 builds carry.

torch's own grouped product on a CPU is a loop over experts in which all threads share each small product and meet at
a barrier after it. MKL's `?gemm_batch` takes the whole list, of any sizes, and spreads the products over the threads.
torch exports the routine from its library but has no operator for unequal sizes, so it is called here by its Fortran
name. Where it does not exist (other processors, other builds), `available` is false and nothing else happens.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Loads = Sequence[int]
FLOAT = 4
"""Bytes of an fp32 number."""


@functools.cache
def available() -> bool:
    """Whether the routine exists and gives the right answer on a small example."""
    if _routine() is None:
        return False
    x_RI, weight_EIO = torch.arange(12.0).view(4, 3), torch.arange(12.0).view(2, 3, 2) - 5
    expected_RO = torch.cat([x_RI[:3] @ weight_EIO[0], x_RI[3:] @ weight_EIO[1]])
    return torch.equal(product(x_RI, weight_EIO, (3, 1)), expected_RO)


def fits(*tensors: Tensor) -> bool:
    """Whether the routine can be used: fp32 on a CPU, rows that lie whole in memory."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and 1 in t.stride()[-2:] for t in tensors)
        and available()
    )


def product(x_RI: Tensor, weight_EIO: Tensor, loads: Loads) -> Tensor:
    """Return each run of `loads[e]` rows times weight e."""
    num_in, num_out = weight_EIO.shape[1:]
    out_RO = x_RI.new_empty(x_RI.shape[0], num_out)
    jobs = [
        ((num_out, load, num_in), weight, rows, out)
        for load, weight, rows, out in zip(
            loads, _matrices(weight_EIO), _runs(x_RI, loads), _runs(out_RO, loads), strict=True
        )
        if load
    ]
    transposed = weight_EIO.stride(2) != 1
    leading = (weight_EIO.stride(2 if transposed else 1), x_RI.stride(0), num_out)
    _multiply(jobs, leading, first_transposed=transposed)
    return out_RO


def weight_gradient(x_RI: Tensor, grad_RO: Tensor, loads: Loads) -> Tensor:
    """Return for each run of rows its x^T grad; zero for an empty one."""
    num_in, num_out = x_RI.shape[1], grad_RO.shape[1]
    out_EIO = x_RI.new_empty(len(loads), num_in, num_out)
    jobs = []
    for expert, (load, grad, rows, out) in enumerate(
        zip(loads, _runs(grad_RO, loads), _runs(x_RI, loads), _matrices(out_EIO), strict=True)
    ):
        if load:
            jobs.append(((num_out, num_in, load), grad, rows, out))
        else:
            out_EIO[expert].zero_()
    _multiply(jobs, (grad_RO.stride(0), x_RI.stride(0), num_out), second_transposed=True)
    return out_EIO


Job = tuple[tuple[int, int, int], int, int, int]
"""Sizes m, n, k of a column-major product C = A B, and the addresses of A, B and C."""


def _multiply(
    jobs: Sequence[Job],
    leading: tuple[int, int, int],
    *,
    first_transposed: bool = False,
    second_transposed: bool = False,
) -> None:
    """Run the jobs. A row-major product is the column-major product of the transposes in the other order."""
    routine, count = _routine(), len(jobs)
    if routine is None or not count:
        return
    ints, floats, addresses = ctypes.c_int * count, ctypes.c_float * count, ctypes.c_void_p * count
    sizes, a, b, c = zip(*jobs, strict=True)
    m, n, k = zip(*sizes, strict=True)
    lda, ldb, ldc = (ints(*[stride] * count) for stride in leading)
    routine(
        (b"T" if first_transposed else b"N") * count,
        (b"T" if second_transposed else b"N") * count,
        *(ints(*m), ints(*n), ints(*k)),
        floats(*[1.0] * count),
        *(addresses(*a), lda, addresses(*b), ldb),
        floats(*[0.0] * count),
        *(addresses(*c), ldc),
        ctypes.byref(ctypes.c_int(count)),
        ints(*[1] * count),
    )


def _matrices(stack: Tensor) -> range:
    step = FLOAT * stack.stride(0)
    return range(stack.data_ptr(), stack.data_ptr() + step * len(stack), step)


def _runs(rows: Tensor, loads: Loads) -> list[int]:
    """Return the address of each run of rows."""
    address, step, found = rows.data_ptr(), FLOAT * rows.stride(0), []
    for load in loads:
        found.append(address)
        address += step * load
    return found


@functools.cache
def _routine() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        routine = ctypes.CDLL(str(library)).SGEMM_BATCH
    except (OSError, AttributeError):
        return None
    routine.restype = None
    return routine
