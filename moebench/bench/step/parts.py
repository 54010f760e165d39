"""The time of a training step by part: timers around the forward parts, the backward pass as one part."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moebench.experts.layer import MoELayer
from moebench.models.transformer import Block
from moebench.training.model import Model

PARTS = (
    "data",
    "embedding, head, loss",
    "attention",
    "router",
    "dispatch, experts",
    "dense FFN",
    "rest of forward",
    "backward",
    "optimizer, clip",
)
"""In the order of a step; the time of the experts does not include that of the router."""


class Stopwatch:
    """Seconds by part since the last reset; on a GPU each reading waits for all kernels before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._part = ""
        """The part that began last."""

    def reset(self) -> None:
        """Set all parts to zero."""
        self.seconds.clear()

    def now(self) -> float:
        """Return the time after all previous work on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def time_part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = self.now()
        self._part = name
        yield
        self.seconds[name] += self.now() - start

    @contextmanager
    def time_modules(self, model: Model) -> Iterator[None]:
        """Time the parts of the model by hooks while the block runs."""
        handles = []
        for module, name in iter_timed_modules(model):
            starts: list[float] = []
            handles.append(module.register_forward_pre_hook(self._before(starts)))
            handles.append(module.register_forward_hook(self._after(starts, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, starts: list[float]) -> Any:
        return lambda module, arguments: starts.append(self.now())

    def _after(self, starts: list[float], name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if self._part != "backward":  # where a block is computed again, which is part of it
                self.seconds[name] += self.now() - starts.pop()

        return hook

    def average_parts(self, num_steps: int) -> dict[str, float]:
        """Return the seconds of one step by part; the remaining forward time is what no timer covers."""
        seconds = {name: self.seconds.get(name, 0.0) for name in PARTS}
        seconds["dispatch, experts"] -= seconds["router"]
        backbone = sum(seconds[name] for name in ("attention", "router", "dispatch, experts", "dense FFN"))
        around = seconds["embedding, head, loss"]
        seconds["rest of forward"] = max(self.seconds.get("forward", 0.0) - backbone - around, 0.0)
        return {name: total / num_steps for name, total in seconds.items()}


def iter_timed_modules(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module to time with the name of its part."""
    yield model.embedding, "embedding, head, loss"
    yield model.head, "embedding, head, loss"
    for block in model.backbone.blocks:
        assert isinstance(block, Block)
        yield block.attention, "attention"
        if isinstance(block.feed_forward, MoELayer):
            yield block.feed_forward, "dispatch, experts"
            yield block.feed_forward.router, "router"
        else:
            yield block.feed_forward, "dense FFN"
