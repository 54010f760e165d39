"""Grouped products: every kernel against a loop over experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebench.experts.grouped import Kernel, group_rows, grouped_matmul
from moebench.experts.kernels import gemm_batch, grouped_mm, loop, padded_bmm
from moebench.experts.kernels.groups import Groups

pytestmark = pytest.mark.usefixtures("kernels_for_few_rows")
KERNELS = {"padded_bmm": padded_bmm, "gemm_batch": gemm_batch, "grouped_mm": grouped_mm, "loop": loop}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def multiply_in_loop(x_RI: Tensor, weight_EIO: Tensor, loads: list[int]) -> Tensor:
    return torch.cat([rows @ weight for rows, weight in zip(x_RI.split(loads), weight_EIO, strict=True)])


def kernel_of(name: str) -> Kernel:
    if name == "gemm_batch" and not gemm_batch.is_available():
        pytest.skip("this torch carries no MKL with a batched product")
    return KERNELS[name]


def pack_rows(loads: list[int]) -> Groups:
    return group_rows(torch.tensor(loads))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("loads", [[3, 3, 3], [5, 0, 1], [0, 0, 4], [0, 7, 0]], ids=str)
def test_every_kernel_computes_the_same(name: str, transposed: bool, loads: list[int]) -> None:
    kernel = kernel_of(name)
    if name == "padded_bmm":
        loads = [max(loads)] * 3
    groups = group_rows(torch.tensor(loads), pad_for=torch.float32 if name == "padded_bmm" else None)
    x_RI, grad_RO = normal(sum(loads), 8), normal(sum(loads), 12, seed=1)
    weight_EIO = normal(3, 12, 8, seed=2).transpose(1, 2) if transposed else normal(3, 8, 12, seed=2)
    assert kernel.fits(groups, x_RI, weight_EIO)
    assert kernel.fits(groups, x_RI, grad_RO)
    torch.testing.assert_close(kernel.product(groups, x_RI, weight_EIO), multiply_in_loop(x_RI, weight_EIO, loads))
    gradient_EIO = torch.stack([x.T @ g for x, g in zip(x_RI.split(loads), grad_RO.split(loads), strict=True)])
    torch.testing.assert_close(kernel.weight_gradient(groups, x_RI, grad_RO), gradient_EIO)


def test_rows_that_are_part_of_a_wider_matrix() -> None:
    kernel, groups = kernel_of("gemm_batch"), pack_rows([2, 3])
    wide_RI, weight_EIO = normal(5, 20), normal(2, 8, 4, seed=1)
    x_RI = wide_RI[:, 4:12]
    torch.testing.assert_close(kernel.product(groups, x_RI, weight_EIO), multiply_in_loop(x_RI, weight_EIO, [2, 3]))


def test_the_batched_routine_is_for_fp32_alone() -> None:
    assert not gemm_batch.is_supported(normal(2, 2, dtype=torch.float64))
    assert not gemm_batch.is_supported(normal(4, 4)[::2, ::2])
    assert not gemm_batch.is_supported(normal(4, 6).T)
    assert gemm_batch.is_supported(normal(2, 2))
    assert gemm_batch.fits(pack_rows([2]), normal(2, 2), normal(1, 2, 2)) is gemm_batch.is_available()


@pytest.mark.parametrize("name", ["gemm_batch", "loop"])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 4), (4, 1), (1, 1), (3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_matrices(name: str, num_in: int, num_out: int, transposed: bool) -> None:
    # A dimension of size 1 has a stride that means nothing.
    kernel, groups = kernel_of(name), pack_rows([1, 0, 2])
    x_RI = normal(3, num_in)
    weight_EIO = (
        normal(3, num_out, num_in, seed=1).transpose(1, 2) if transposed else normal(3, num_in, num_out, seed=1)
    )
    assert kernel.fits(groups, x_RI, weight_EIO)
    torch.testing.assert_close(kernel.product(groups, x_RI, weight_EIO), multiply_in_loop(x_RI, weight_EIO, [1, 0, 2]))


@pytest.mark.parametrize("name", ["grouped_mm", "loop"])
def test_rows_behind_the_last_expert_are_not_touched(name: str) -> None:
    kernel, groups = kernel_of(name), pack_rows([2, 1])
    x_RI, weight_EIO = normal(5, 8), normal(2, 8, 4, seed=1)
    expected_RO = multiply_in_loop(x_RI[:3], weight_EIO, [2, 1])
    torch.testing.assert_close(kernel.product(groups, x_RI, weight_EIO)[:3], expected_RO)
    gradient_EIO = kernel.weight_gradient(groups, x_RI, normal(5, 4, seed=2))
    torch.testing.assert_close(gradient_EIO[1], x_RI[2:3].T @ normal(5, 4, seed=2)[2:3])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_padding_is_bounded_and_only_for_nearly_even_loads(loads: list[int]) -> None:
    groups = group_rows(torch.tensor(loads), pad_for=torch.float32)
    assert groups.num_rows is not None
    if groups.capacity is None:
        assert groups.num_rows == sum(loads)
    else:
        assert groups.capacity == max(loads)
        assert groups.num_rows - sum(loads) <= 12 * len(loads)
    if len(set(loads)) == 1 and loads[0]:
        assert groups.num_rows == sum(loads)
        assert groups.capacity == loads[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loads", [[40, 3, 21, 0], [16, 16, 16, 16]], ids=str)
def test_products_repeat_to_the_last_bit(threads: int, loads: list[int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x_RI, weight_EIO, load_E = normal(64, 96), normal(4, 96, 160, seed=1), torch.tensor(loads)
        x_RI.requires_grad_()
        weight_EIO.requires_grad_()
        runs = []
        for _ in range(5):
            out_RO = grouped_matmul(x_RI, weight_EIO, load_E)
            runs.append([out_RO, *torch.autograd.grad(out_RO.square().sum(), (x_RI, weight_EIO))])
        assert all(torch.equal(first, other) for run in runs[1:] for first, other in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)
