"""Change the routing of a trained model for the length of a `with` block, from outside of its layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from moebench.experts.layer import MoELayer
from moebench.routing.context import RouteContext
from moebench.routing.mixing import SoftRouting
from moebench.routing.router import Router
from moebench.routing.values import AnyRouting, Routing


@contextmanager
def change_routing(layers: Mapping[str, MoELayer], change: Callable[[Any, RouteContext], AnyRouting]) -> Iterator[None]:
    """Replace what the routers of the layers return by `change(routing, ctx)`."""
    handles = [
        layer.router.register_forward_hook(lambda _, inputs, routing: change(routing, inputs[1]))
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replace_routers(layers: Mapping[str, MoELayer], routers: Mapping[str, Router]) -> Iterator[None]:
    """Route by other routers of the same class; the experts stay."""
    trained = {name: layer.router for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.router = routers[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.router = trained[name]


def drop_expert(routing: Routing | SoftRouting, expert: int) -> Routing | SoftRouting:
    """Return the routing in which nothing comes back from an expert.

    The weights of the others stay as they are, so this is also what the layer computes if the expert returns 0.
    """
    if isinstance(routing, SoftRouting):
        slot_S = torch.arange(routing.combine_BLS.shape[2], device=routing.combine_BLS.device)
        belongs_S = slot_S // routing.slots_per_expert == expert
        return replace(routing, combine_BLS=routing.combine_BLS.masked_fill(belongs_S, 0.0))
    return routing.keep(routing.expert_N != expert)


def shuffle_tokens(routing: Routing, valid_T: Tensor | None, generator: Generator) -> Routing:
    """Return the routing in which every token gets the experts and weights of another token, drawn at random.

    Loads, weights and numbers of experts stay as they are; only which token goes where is lost. Padding stays where it
    is.
    """
    source_T = torch.arange(routing.num_tokens)
    tokens_V = source_T.clone() if valid_T is None else valid_T.cpu().nonzero().squeeze(1)
    source_T[tokens_V] = tokens_V[torch.randperm(len(tokens_V), generator=generator)]
    source_T = source_T.to(routing.token_N.device)
    target_T = torch.empty_like(source_T).scatter_(0, source_T, torch.arange(len(source_T), device=source_T.device))
    token_N = target_T[routing.token_N]
    order_N = token_N.argsort(stable=True)  # a rectangle of k experts for each token stays one

    def reorder(value_N: Tensor | None) -> Tensor | None:
        return None if value_N is None else value_N[order_N]

    def move(value_TX: Tensor | None) -> Tensor | None:
        return None if value_TX is None else value_TX[source_T]

    return replace(
        routing,
        token_N=token_N[order_N],
        expert_N=routing.expert_N[order_N],
        weight_N=routing.weight_N[order_N],
        priority_N=reorder(routing.priority_N),
        kept_N=reorder(routing.kept_N),
        logits_TE=move(routing.logits_TE),
        scores_TE=move(routing.scores_TE),
        token_extras={name: value_T[source_T] for name, value_T in routing.token_extras.items()},
    )
