"""`train.compile`: the blocks of a model as compiled graphs, for training and the evaluations of a run."""

import torch
from torch import nn

from moebench.errors import UsageError
from moebench.models.transformer import Transformer

BACKEND = "inductor"
GRAPHS_PER_BLOCK = 16
"""Graphs that a block may have: with and without gradients, of a batch and a smaller last one, and after a break."""


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Let each block of a model compile itself when it is called first; raise UsageError where nothing can compile.

    The names of parameters stay as they are. What the compiler cannot trace runs as without it.
    """
    _require_compiler(device)
    blocks = [block for module in model.modules() if isinstance(module, Transformer) for block in module.blocks]
    options = torch._dynamo.config
    # Blocks share their code and differ in their layer's name, by which routers draw: each has its own graphs.
    options.recompile_limit = max(options.recompile_limit, GRAPHS_PER_BLOCK * len(blocks))
    options.accumulated_recompile_limit = max(options.accumulated_recompile_limit, options.recompile_limit)
    options.capture_dynamic_output_shape_ops = True  # the rows of experts, whose number is known when they run
    for block in blocks:
        block.compile(backend=BACKEND)


def _require_compiler(device: torch.device) -> None:
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "train.compile: true needs a C++ compiler on a CPU, and none was found; install g++, name one by the"
            " environment variable CXX, or give train.compile=false"
        ) from None
