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
SHARES = 5
"""A product of more than a fifth of a thread's part of the rows is not left to one thread (measured on two threads)."""


@functools.cache
def available() -> bool:
    """Whether the routine exists and gives the right answer on a small example."""
    if _routine() is None:
        return False
    x_RI, weight_EIO = torch.arange(12.0).view(4, 3), torch.arange(12.0).view(2, 3, 2) - 5
    expected_RO = torch.cat([x_RI[:3] @ weight_EIO[0], x_RI[3:] @ weight_EIO[1]])
    return torch.equal(product(x_RI, weight_EIO, (3, 1)), expected_RO)


def fits(*tensors: Tensor) -> bool:
    """Whether the routine can be used: fp32 on a CPU, rows of numbers side by side (of matrices, or their columns)."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and _side_by_side(t) for t in tensors) and available()
    )


def _side_by_side(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or (tensor.dim() == 3 and tensor.stride(-2) == 1)


def product(x_RI: Tensor, weight_EIO: Tensor, loads: Loads) -> Tensor:
    """Return each run of `loads[e]` rows times weight e."""
    num_in, num_out = weight_EIO.shape[1:]
    out_RO = x_RI.new_empty(x_RI.shape[0], num_out)
    alone = _alone(loads)
    for expert, first in alone.items():
        rows = slice(first, first + loads[expert])
        torch.mm(x_RI[rows], weight_EIO[expert], out=out_RO[rows])
    addresses = zip(_matrices(weight_EIO), _runs(x_RI, loads), _runs(out_RO, loads), strict=True)
    jobs = [((num_out, loads[e], num_in), *abc) for e, abc in enumerate(addresses) if loads[e] and e not in alone]
    transposed = weight_EIO.stride(2) != 1
    # The stride of a dimension of size 1 can be anything; the routine wants at least a row's length.
    weight_stride = max(weight_EIO.stride(2), num_in) if transposed else max(weight_EIO.stride(1), num_out)
    _multiply(jobs, (weight_stride, max(x_RI.stride(0), num_in), num_out), first_transposed=transposed)
    return out_RO


def weight_gradient(x_RI: Tensor, grad_RO: Tensor, loads: Loads) -> Tensor:
    """Return for each run of rows its x^T grad; zero for an empty one."""
    num_in, num_out = x_RI.shape[1], grad_RO.shape[1]
    out_EIO = x_RI.new_empty(len(loads), num_in, num_out)
    alone = _alone(loads)
    for expert, first in alone.items():
        rows = slice(first, first + loads[expert])
        torch.mm(x_RI[rows].T, grad_RO[rows], out=out_EIO[expert])
    for expert, load in enumerate(loads):
        if not load:
            out_EIO[expert].zero_()
    addresses = zip(_runs(grad_RO, loads), _runs(x_RI, loads), _matrices(out_EIO), strict=True)
    jobs = [((num_out, num_in, loads[e]), *abc) for e, abc in enumerate(addresses) if loads[e] and e not in alone]
    leading = (max(grad_RO.stride(0), num_out), max(x_RI.stride(0), num_in), num_out)
    _multiply(jobs, leading, second_transposed=True)
    return out_EIO


def _alone(loads: Loads) -> dict[int, int]:
    """Return the experts whose product all threads share, each with its first row.

    In the batch a product belongs to one thread; one that is large beside a thread's part of the rows would keep the
    other threads waiting.
    """
    limit = sum(loads) / (SHARES * torch.get_num_threads())
    found, first = {}, 0
    for expert, load in enumerate(loads):
        if load > limit and torch.get_num_threads() > 1:
            found[expert] = first
        first += load
    return found


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
