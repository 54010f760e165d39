"""Models without storage, built for their shapes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

_DRAWS = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_}
"""Functions that draw initial weights in place."""


class _SkipDraws(TorchFunctionMode):
    """Draws no values for tensors that have none: PyTorch imports its compiler for that, which takes a second."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def build_without_storage() -> Iterator[None]:
    """Create the parameters of the block's modules on the meta device: they have shapes and no values."""
    with torch.device("meta"), _SkipDraws():
        yield
