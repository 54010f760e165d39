"""Matrix products of different sizes in one call: the batched GEMM of the MKL that torch's x86 builds carry.

torch's own grouped product on a CPU is a loop over experts in which all threads share each small product and meet at a
barrier after it. MKL's `?gemm_batch` takes the whole list, of any sizes, and spreads the products over the threads.
torch exports the routine from its library but has no operator for unequal sizes, so it is called here by its Fortran
name. Where it does not exist (other processors, other builds), the kernel does not fit.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moebench.experts.kernels.groups import Groups

Loads = Sequence[int]
FLOAT_BYTES = 4
SHARES = 5
"""A product of more than a fifth of a thread's part of the rows is not left to one thread (measured on two threads)."""
MIN_ROWS = 16
"""Rows per expert below which torch's loop over products is faster: each reads a matrix, which threads then share."""


@functools.cache
def is_available() -> bool:
    """Return whether the routine exists and gives the right answer on a small example."""
    if _load_routine() is None:
        return False
    x_RI, weight_EIO = torch.arange(12.0).view(4, 3), torch.arange(12.0).view(2, 3, 2) - 5
    expected_RO = torch.cat([x_RI[:3] @ weight_EIO[0], x_RI[3:] @ weight_EIO[1]])
    return torch.equal(_multiply_rows(x_RI, weight_EIO, (3, 1)), expected_RO)


def fits(groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
    """Return whether the loads are known, a batch is worth its call, and the routine takes both tensors."""
    loads = groups.loads or ()
    return bool(loads) and _is_worthwhile(loads) and is_supported(x_RI) and is_supported(other) and is_available()


def _is_worthwhile(loads: Loads) -> bool:
    """Return whether experts have enough rows, and the products of most of them are left to one thread each."""
    return sum(loads) >= MIN_ROWS * len(loads) and 2 * len(_products_of_all_threads(loads)) <= len(loads)


def is_supported(tensor: Tensor) -> bool:
    """Return whether a tensor is fp32 on a CPU, with the elements of each row (or of a matrix's column) contiguous."""
    is_contiguous = tensor.stride(-1) == 1 or (tensor.dim() == 3 and tensor.stride(-2) == 1)
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and is_contiguous


def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Return x_r times the matrix of its expert for every row."""
    return _multiply_rows(x_RI, weight_EIO, groups.loads or ())


def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
    """Return for each expert the sum over its rows of the outer product x_r g_r: zero for an idle expert."""
    loads = groups.loads or ()
    num_in, num_out = x_RI.shape[1], grad_RO.shape[1]
    out_EIO = x_RI.new_empty(len(loads), num_in, num_out)
    shared = _products_of_all_threads(loads)
    for expert, first in shared.items():
        rows = slice(first, first + loads[expert])
        torch.mm(x_RI[rows].T, grad_RO[rows], out=out_EIO[expert])
    for expert, load in enumerate(loads):
        if not load:
            out_EIO[expert].zero_()
    addresses = zip(
        _row_addresses(grad_RO, loads), _row_addresses(x_RI, loads), _matrix_addresses(out_EIO), strict=True
    )
    jobs = [((num_out, num_in, loads[e]), *abc) for e, abc in enumerate(addresses) if loads[e] and e not in shared]
    leading = (max(grad_RO.stride(0), num_out), max(x_RI.stride(0), num_in), num_out)
    _run_jobs(jobs, leading, second_transposed=True)
    return out_EIO


def _multiply_rows(x_RI: Tensor, weight_EIO: Tensor, loads: Loads) -> Tensor:
    num_in, num_out = weight_EIO.shape[1:]
    out_RO = x_RI.new_empty(x_RI.shape[0], num_out)
    shared = _products_of_all_threads(loads)
    for expert, first in shared.items():
        rows = slice(first, first + loads[expert])
        torch.mm(x_RI[rows], weight_EIO[expert], out=out_RO[rows])
    addresses = zip(
        _matrix_addresses(weight_EIO), _row_addresses(x_RI, loads), _row_addresses(out_RO, loads), strict=True
    )
    jobs = [((num_out, loads[e], num_in), *abc) for e, abc in enumerate(addresses) if loads[e] and e not in shared]
    transposed = weight_EIO.stride(2) != 1
    # The stride of a dimension of size 1 can be anything; the routine needs at least a row's length.
    weight_stride = max(weight_EIO.stride(2), num_in) if transposed else max(weight_EIO.stride(1), num_out)
    _run_jobs(jobs, (weight_stride, max(x_RI.stride(0), num_in), num_out), first_transposed=transposed)
    return out_RO


def _products_of_all_threads(loads: Loads) -> dict[int, int]:
    """Return the experts whose product all threads share, each with its first row.

    In the batch a product belongs to one thread; one that is large beside a thread's part of the rows would keep the
    other threads waiting.
    """
    limit = sum(loads) / (SHARES * torch.get_num_threads())
    first_row, first = {}, 0
    for expert, load in enumerate(loads):
        if load > limit and torch.get_num_threads() > 1:
            first_row[expert] = first
        first += load
    return first_row


Job = tuple[tuple[int, int, int], int, int, int]
"""Sizes m, n, k of a column-major product C = A B, and the addresses of A, B and C."""


def _run_jobs(
    jobs: Sequence[Job],
    leading: tuple[int, int, int],
    *,
    first_transposed: bool = False,
    second_transposed: bool = False,
) -> None:
    """Run the jobs. A row-major product is the column-major product of the transposes in the other order."""
    routine, count = _load_routine(), len(jobs)
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


def _matrix_addresses(stack: Tensor) -> range:
    step = FLOAT_BYTES * stack.stride(0)
    return range(stack.data_ptr(), stack.data_ptr() + step * len(stack), step)


def _row_addresses(rows: Tensor, loads: Loads) -> list[int]:
    """Return the address of each run of rows."""
    address, step, addresses = rows.data_ptr(), FLOAT_BYTES * rows.stride(0), []
    for load in loads:
        addresses.append(address)
        address += step * load
    return addresses


@functools.cache
def _load_routine() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        routine = ctypes.CDLL(str(library)).SGEMM_BATCH
    except (OSError, AttributeError):
        return None
    routine.restype = None
    return routine
