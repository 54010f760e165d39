"""Logits that are never held as a whole: a cross-entropy of 16k tokens over 50k words needs megabytes, not gigabytes.

The output of a large vocabulary is the largest tensor of a training step: T x V logits in two precisions, their
gradient and the softmax of the loss. `DeferredLogits` keeps the two factors of the product instead and computes the
loss over chunks of tokens; the backward pass computes the logits of each chunk again. Of the values that training
needs, all are sums over the vocabulary: the loss of each token and log Z.

torch 2.13 has `torch.nn.functional.linear_cross_entropy` with the same idea. It returns no log Z, which the z-loss
needs, and earlier versions of torch do not have it; a test compares the two.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_LOGITS = {"full": None, "auto": 2**28, "chunked": 0}
"""train.cross_entropy -> logits of a batch above which they are deferred; None: never."""
CHUNK_LOGITS = 2**27
"""Logits of a chunk: half a GiB in fp32; a chunk needs about twice as much memory."""


class DeferredLogits:
    """The product x W^T [..., V] of vectors [..., D] and a projection [V, D], computed in chunks where it is needed.

    Under autocast the product is computed in the precision of matrix products, as by a linear layer.
    """

    def __init__(self, x_BLD: Tensor, weight_VD: Tensor, chunk_logits: int | None = None) -> None:
        """`chunk_logits`: how many exist at a time, at least those of one token; None: `CHUNK_LOGITS`."""
        self.x_BLD = x_BLD
        self.weight_VD = weight_VD
        self.chunk_tokens = max((chunk_logits or CHUNK_LOGITS) // weight_VD.shape[0], 1)
        self._log_z_BL: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether losses of the logits have a gradient."""
        return torch.is_grad_enabled() and (self.x_BLD.requires_grad or self.weight_VD.requires_grad)

    def compute_cross_entropy(self, target_BL: Tensor) -> Tensor:
        """Return the loss in nats of each target (int64, of any shape with as many elements): fp32, of its shape."""
        shape, device = self.x_BLD.shape[:-1], self.x_BLD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.x_BLD.dtype
        with torch.autocast(device, enabled=False):
            compute: Any = _LinearCrossEntropy.apply  # it has no types
            x_TD, target_T = self.x_BLD.flatten(0, -2), target_BL.reshape(-1)
            loss_T, log_z_T = compute(x_TD, self.weight_VD, target_T, self.chunk_tokens, dtype)
        self._log_z_BL = log_z_T.view(shape)
        loss_BL: Tensor = loss_T.view(target_BL.shape)
        return loss_BL

    def compute_log_z(self) -> Tensor:
        """Return log Z = log Σ_v exp(logit_v) of each vector, fp32; free after `compute_cross_entropy`."""
        if self._log_z_BL is None:
            self.compute_cross_entropy(torch.zeros(self.x_BLD.shape[:-1], dtype=torch.int64, device=self.x_BLD.device))
        assert self._log_z_BL is not None
        return self._log_z_BL

    def argmax(self) -> Tensor:
        """Return the index of the largest logit of each vector, int64."""
        x_TD = self.x_BLD.flatten(0, -2)
        index_T = torch.cat([functional.linear(x_TD[rows], self.weight_VD).argmax(-1) for rows in self._chunks()])
        return index_T.view(self.x_BLD.shape[:-1])

    def project(self) -> Tensor:
        """Return all logits [..., V]."""
        return functional.linear(self.x_BLD, self.weight_VD)

    def _chunks(self) -> Iterator[slice]:
        return _iter_chunks(self.x_BLD.shape[:-1].numel(), self.chunk_tokens)


ModelOutput = Tensor | DeferredLogits
"""What a model returns for a batch, and what the loss of its task reads."""


def defer_logits(x_BLD: Tensor, weight_VD: Tensor, max_logits: int | None) -> DeferredLogits | None:
    """Return the logits as two factors where there would be more than `max_logits`, else None; None: no limit."""
    if max_logits is None or x_BLD.shape[:-1].numel() * weight_VD.shape[0] <= max_logits:
        return None
    return DeferredLogits(x_BLD, weight_VD)


def compute_log_z(output: ModelOutput) -> Tensor:
    """Return log Z of each vector of logits, fp32."""
    if isinstance(output, DeferredLogits):
        return output.compute_log_z()
    return output.float().logsumexp(-1)


def _iter_chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield the chunks of tokens, all of nearly the same size: a short last one would use the device badly."""
    num_chunks = max(-(-num_tokens // chunk_tokens), 1)
    size = max(-(-num_tokens // num_chunks), 1)
    return (slice(start, start + size) for start in range(0, max(num_tokens, 1), size))


class _LinearCrossEntropy(torch.autograd.Function):
    """(x_TD, weight_VD, target_T, chunk_tokens, dtype) -> loss_T, log_z_T in fp32; `dtype`: of the matrix products."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        loss_T, log_z_T = (torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device) for _ in range(2))
        cast_VD = weight_VD.to(dtype)
        for rows in _iter_chunks(len(x_TD), chunk_tokens):
            logits_CV = (x_TD[rows].to(dtype) @ cast_VD.T).float()
            label_C = logits_CV.gather(1, target_T[rows, None]).squeeze(1)
            largest_C1 = logits_CV.amax(1, keepdim=True)
            log_z_T[rows] = logits_CV.sub_(largest_C1).exp_().sum(1).log_().add_(largest_C1.squeeze(1))
            loss_T[rows] = log_z_T[rows] - label_C
            del logits_CV  # before the next chunk is computed
        ctx.save_for_backward(x_TD, weight_VD, target_T, log_z_T)
        ctx.chunk_tokens, ctx.dtype = chunk_tokens, dtype
        return loss_T, log_z_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_TD, weight_VD, target_T, log_z_T = ctx.saved_tensors
        grad_loss_T, grad_log_z_T = grads_T
        cast_VD = weight_VD.to(ctx.dtype)
        grad_TD = torch.empty_like(x_TD)
        grad_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_TD.device)
        for rows in _iter_chunks(len(x_TD), ctx.chunk_tokens):
            x_CD, grad_loss_C1 = x_TD[rows].to(ctx.dtype), grad_loss_T[rows, None]
            # The gradient of the loss by the logits is p - onehot(target), that of log Z is p.
            share_CV = (x_CD @ cast_VD.T).float().sub_(log_z_T[rows, None]).exp_()
            share_CV.mul_(grad_loss_C1 + grad_log_z_T[rows, None]).scatter_add_(1, target_T[rows, None], -grad_loss_C1)
            grad_CV = share_CV.to(ctx.dtype)
            del share_CV
            grad_TD[rows] = (grad_CV @ cast_VD).to(grad_TD.dtype)
            if ctx.dtype == torch.float32:
                grad_VD.addmm_(grad_CV.T, x_CD)
            else:
                grad_VD += grad_CV.T @ x_CD
            del grad_CV
        return grad_TD, grad_VD.to(weight_VD.dtype), None, None, None
