"""Constant vectors on the device of another tensor, without a copy from the host, which would wait for it."""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor


def build_constant_like(values: Iterable[float], like: Tensor) -> Tensor:
    """Return a vector of these values, in the precision and on the device of `like`."""
    return torch.cat([like.new_zeros(0), *[like.new_full((len(list(run)),), value) for value, run in groupby(values)]])
