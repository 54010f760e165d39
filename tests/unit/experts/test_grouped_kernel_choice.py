"""Which kernel computes a grouped product."""

import pytest
import torch
from torch import Tensor

from moebench.experts.grouped import choose_kernel, group_rows, grouped_matmul
from moebench.experts.kernels import gemm_batch, grouped_mm, loop, padded_bmm
from moebench.experts.kernels.groups import Groups


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_first_kernel_that_fits_is_chosen() -> None:
    x_RI, weight_EIO, loads = normal(6, 8), normal(2, 8, 4, seed=1), torch.tensor([3, 3])
    assert choose_kernel(group_rows(5 * loads, pad_for=torch.float32), x_RI, weight_EIO) is grouped_mm
    assert choose_kernel(group_rows(6 * loads, pad_for=torch.float32), x_RI, weight_EIO) is padded_bmm
    assert group_rows(loads, pad_for=torch.bfloat16).capacity == 3
    assert group_rows(6 * loads, pad_for=torch.float64).capacity is None
    assert choose_kernel(group_rows(loads), x_RI, weight_EIO) is grouped_mm
    assert choose_kernel(group_rows(loads), x_RI.bfloat16(), weight_EIO.bfloat16()[..., :0]) is grouped_mm
    assert choose_kernel(group_rows(loads), x_RI.bfloat16(), weight_EIO.bfloat16()) is loop, "8 bytes a row of results"
    assert choose_kernel(group_rows(loads), x_RI.double(), weight_EIO.double()) is loop
    on_device = Groups(load_E=loads, offset_E=loads.cumsum(0, dtype=torch.int32), loads=None, capacity=None)
    assert choose_kernel(on_device, x_RI.bfloat16(), weight_EIO.bfloat16()) is grouped_mm, "padded with zeros"
    assert choose_kernel(on_device, x_RI[:0], weight_EIO) is loop


@pytest.mark.skipif(not gemm_batch.is_available(), reason="not the MKL of torch's x86 builds")
@pytest.mark.parametrize(
    ("loads", "is_chosen"),
    [([16] * 20, True), ([15] * 20, False), ([0] * 10 + [32] * 20, True), ([16] * 4, False), ([500, *[16] * 20], True)],
    ids=["even", "few rows", "idle experts", "few experts", "one hot expert"],
)
def test_a_batch_has_enough_products_and_rows(
    loads: list[int], is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x_RI, weight_EIO = normal(sum(loads), 8), normal(len(loads), 8, 4, seed=1)
    kernel = choose_kernel(group_rows(torch.tensor(loads)), x_RI, weight_EIO)
    assert kernel is (gemm_batch if is_chosen else grouped_mm)
    torch.testing.assert_close(
        kernel.product(group_rows(torch.tensor(loads)), x_RI, weight_EIO),
        torch.cat([rows @ weight for rows, weight in zip(x_RI.split(loads), weight_EIO, strict=True)]),
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, in its tracing
def test_products_of_few_rows_are_traced() -> None:
    # torch traces its grouped product on a CPU in bf16 only.
    x_RI, weight_EIO, load_E = normal(8, 8), normal(4, 8, 4, seed=1), torch.tensor([3, 0, 1, 4])
    assert choose_kernel(group_rows(load_E), x_RI, weight_EIO) is grouped_mm
    compiled = torch.compile(grouped_matmul, backend="aot_eager")
    torch.testing.assert_close(compiled(x_RI, weight_EIO, load_E), grouped_matmul(x_RI, weight_EIO, load_E))
