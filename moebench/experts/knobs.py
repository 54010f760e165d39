"""The knobs of a model's routers: what sets how many experts tokens use, and can be adjusted while it trains."""

from collections.abc import Collection, Iterator, Sequence

import torch

from moebench.experts.layer import MoELayer
from moebench.routing.budget import Knob
from moebench.routing.router import ROUTERS, Router, RouterConfig


def find_knobs(layers: Sequence[MoELayer]) -> Iterator[tuple[Router, Knob]]:
    """Yield each router, those inside routers of groups included, that declares what controls its compute."""
    for module in dict.fromkeys(module for layer in layers for module in layer.router.modules()):
        if isinstance(module, Router):
            entry = ROUTERS.get(module.config.name)
            if entry.facts.budget is not None and isinstance(module, entry.item):
                yield module, entry.facts.budget


def make_adjustable(layers: Sequence[MoELayer]) -> None:
    """Make the knobs of all routers buffers, so that they are in checkpoints and on the device."""
    for router, knob in find_knobs(layers):
        value = float(getattr(router, knob.attribute))
        delattr(router, knob.attribute)
        router.register_buffer(knob.attribute, torch.tensor(value))


def set_options(layers: Sequence[MoELayer], config: RouterConfig, names: Collection[str]) -> None:
    """Set the knobs that are options of the router, and named, to the values of its configuration.

    Otherwise the values that training has found, which are loaded with the weights, would hide those of `config`.
    """
    for router, knob in find_knobs(layers):
        buffer = getattr(router, knob.attribute)
        if knob.attribute in names and isinstance(buffer, torch.Tensor):
            buffer.fill_(getattr(config, knob.attribute))
