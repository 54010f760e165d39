"""Where the time of a training step goes: timers around the forward parts, the backward pass as a whole."""

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
"""In the order of a step; the router's time is not in that of the experts, whose layer holds it."""


class Stopwatch:
    """Seconds by part since the last reset; on a GPU each reading waits for the kernels before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def reset(self) -> None:
        """Start from zero."""
        self.seconds.clear()

    def now(self) -> float:
        """Read the clock when everything before is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    @contextmanager
    def watching(self, model: Model) -> Iterator[None]:
        """Time the model's parts by hooks while the block runs."""
        handles = []
        for module, name in named_parts(model):
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
            self.seconds[name] += self.now() - starts.pop()

        return hook

    def by_part(self, num_steps: int) -> dict[str, float]:
        """Return the seconds of one step by part; what no timer saw of the forward pass is its rest."""
        found = {name: self.seconds.get(name, 0.0) for name in PARTS}
        found["dispatch, experts"] -= found["router"]
        inside = sum(found[name] for name in ("attention", "router", "dispatch, experts", "dense FFN"))
        ends = found["embedding, head, loss"]
        found["rest of forward"] = max(self.seconds.get("forward", 0.0) - inside - ends, 0.0)
        return {name: seconds / num_steps for name, seconds in found.items()}


def named_parts(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that are timed and the part each belongs to."""
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
