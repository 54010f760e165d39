"""What experts compute besides matrix products, one pass over memory each: by kernels of a GPU or torch's operators."""

from typing import Protocol

from torch import Tensor

from moebench.experts.kernels import activation, rows
from moebench.routing.kernels.backend import read_choice, uses_triton


class ActivationKernels(Protocol):
    """Activations of hidden units; gated: silu of the first half times the second half, else gelu."""

    def activate(self, hidden_RF: Tensor, *, gated: bool) -> Tensor:
        """Return the activation."""

    def activate_backward(self, grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
        """Return the gradient of the hidden units."""


class GPUActivationKernels(ActivationKernels, Protocol):
    """The same for rows that have weights."""

    def weighted_backward(
        self, grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, *, gated: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate w_r act(h_r): return the gradient of h, w act(h) itself, and the gradient of w, fp32."""


class RowKernels(Protocol):
    """Gathers of rows, and sums of gathered rows."""

    def gather(self, x_TD: Tensor, index_R: Tensor) -> Tensor:
        """Return the rows of x_TD at the indices."""

    def sum_groups(self, value_RD: Tensor, row_M: Tensor, start_T: Tensor | None, weight_M: Tensor | None) -> Tensor:
        """Return the sum of each token's rows, [T, D], each times its weight if weights are given."""

    def weigh_gathered(self, grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return w_r g_t(r), and the inner products of y_r and g_t(r)."""


def activation_kernels(tensor: Tensor) -> ActivationKernels:
    """Return the kernels for a tensor."""
    return gpu_activation_kernels() if uses_triton(tensor) else activation


def gpu_activation_kernels() -> GPUActivationKernels:
    """Return the kernels for tensors that Triton's take."""
    if read_choice() == "liger":
        from moebench.experts.kernels.gpu import liger

        return liger
    from moebench.experts.kernels.gpu import activation as in_triton

    return in_triton


def row_kernels(tensor: Tensor) -> RowKernels:
    """Return the kernels for a tensor."""
    if uses_triton(tensor):
        from moebench.experts.kernels.gpu import rows as in_triton

        return in_triton
    return rows
