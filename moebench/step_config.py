"""The options of how a training step is computed: part of the section `train` of a configuration."""

from dataclasses import dataclass
from typing import Literal

from moebench.errors import require


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Options of `train` that choose how a step is computed, not what it computes."""

    cross_entropy: Literal["auto", "full", "chunked"] = "auto"
    """How the loss of tasks that predict tokens is computed: from all logits of a micro-batch at once (full), or chunk
    by chunk, with the logits computed again in the backward pass (chunked), which needs less memory and gives the same
    loss up to rounding. auto: chunked from 2^28 logits on, such as 8,192 tokens of a vocabulary of 32,768."""
    recompute: Literal["none", "blocks"] = "none"
    """Activations that are computed again in the backward pass instead of kept: none, or all inside each transformer
    block (a third more FLOPs, and memory for the inputs of blocks and for one block at a time). layout.recompute is
    that of experts alone."""
    compile: bool = False
    """Compile the blocks of the model (`torch.compile`): fewer and larger kernels on a GPU, after first steps that take
    up to minutes. Parts of routers that draw random numbers are not compiled. Not with tf32, and not for experts on
    several processes. On a CPU it needs a C++ compiler. Results change by rounding."""
    tf32: bool = False
    """On a GPU, compute products of fp32 matrices in TF32 (10 bits of mantissa), on its tensor cores; routers stay
    exact. For precision=fp32; it changes nothing on a CPU."""

    def check_step(self) -> None:
        """Raise UsageError for options that cannot be combined."""
        # A graph does not switch the precision of products, as routers need it.
        require(not (self.compile and self.tf32), "train.tf32", "true", "false with train.compile=true")
