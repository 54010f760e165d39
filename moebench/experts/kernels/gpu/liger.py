"""SwiGLU by liger-kernel (an optional package); it has no gelu of one argument, which stays with our kernels.

Its backward pass gives the gradient of the hidden units alone: the weighted activation and the gradient of the weights
take further passes over memory.
"""

import torch
from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward
from torch import Tensor

from moebench.experts.kernels.gpu import activation


def activate(hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return gelu of the hidden units, or silu of their first half times the second half."""
    if not gated or not hidden_RF.numel():
        return activation.activate(hidden_RF, gated=gated)
    with torch.cuda.device_of(hidden_RF):
        y_RF: Tensor = swiglu_fused_gate_up_forward(hidden_RF.contiguous())[1]
    return y_RF


def activate_backward(grad_RF: Tensor, hidden_RF: Tensor, *, gated: bool) -> Tensor:
    """Return the gradient of the hidden units."""
    if not gated or not hidden_RF.numel():
        return activation.activate_backward(grad_RF, hidden_RF, gated=gated)
    with torch.cuda.device_of(hidden_RF):
        gradient_RF: Tensor = swiglu_fused_gate_up_backward(hidden_RF.contiguous(), grad_RF.contiguous())
    return gradient_RF


def weighted_backward(
    grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate w_r act(h_r): return the gradient of h, w act(h) itself, and the gradient of w, fp32."""
    if not gated or not hidden_RF.numel():
        return activation.weighted_backward(grad_RF, hidden_RF, weight_R, gated=gated)
    active_RF, weight_R1 = activate(hidden_RF, gated=True), weight_R.to(grad_RF.dtype).unsqueeze(-1)
    grad_weight_R = (active_RF * grad_RF).sum(-1, dtype=weight_R.dtype)
    grad_hidden_RF = activate_backward(grad_RF * weight_R1, hidden_RF, gated=True)
    return grad_hidden_RF, active_RF.mul_(weight_R1), grad_weight_R
