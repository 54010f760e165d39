"""The problem of one row of the layer benchmark: the same weights and the same input for every library."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moebench.bench.layer.loads import make_input
from moebench.bench.layer.shapes import Shape
from moebench.experts.activation import GATED
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.models.transformer import init_weights
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.seeds import make_generator

SEQUENCE = 256
"""Tokens per sequence for libraries that route each sequence separately, where it divides the tokens."""
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Allowed difference of two outputs of the same formula, as a share of the largest output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Shape, load, weights and input of one row."""

    shape: Shape
    load: str
    seed: int
    device: torch.device
    dtype: torch.dtype
    dense: FeedForward
    """Dense network of equal active FLOPs: width k·hidden."""
    layer: MoELayer
    """moebench's own layer, dropless; the other libraries copy its weights."""
    x_TD: Tensor

    @property
    def gate_ED(self) -> Tensor:
        """The gate's weights."""
        gate = self.layer.router.gate
        assert isinstance(gate, Gate)
        return gate.weight_ED.detach()

    @property
    def bank(self) -> ExpertBank:
        """The experts: w_in_EDF (for gated activations two halves, the first goes through silu) and w_out_EFD."""
        assert isinstance(self.layer.bank, ExpertBank)
        return self.layer.bank

    @property
    def is_gated(self) -> bool:
        """Whether the activation has a second input projection."""
        return GATED[self.shape.activation]

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        tokens = self.shape.num_tokens
        return SEQUENCE if tokens % SEQUENCE == 0 else tokens

    def place_module(self, module: nn.Module) -> nn.Module:
        """Move another library's module to this row's device and precision."""
        return module.to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A layer that is timed."""

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    """x_TD -> y_TD."""
    note: str = ""
    agrees_with: str | None = "moebench"
    """Candidate with equal output; None where the formula differs or other assignments are dropped."""
    measure_dropped: Callable[[], float] = field(default=lambda: 0.0)
    """Return the share of assignments that it does not compute on this input, in training mode."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A variant or library that is not measured, with the reason."""

    name: str
    reason: str


def make_problem(
    shape: Shape, load: str, *, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Problem:
    """Return the problem of a row, with weights and input drawn from the seed."""
    parts = nn.ModuleDict(
        {
            "dense": FeedForward(shape.d_model, shape.top_k * shape.hidden, shape.activation),
            "layer": make_layer(shape, ExpertBank(shape.d_model, shape.hidden, shape.num_experts, shape.activation)),
        }
    )
    init_weights(parts, seed)
    dense, layer = parts["dense"], parts["layer"]
    assert isinstance(dense, FeedForward)
    assert isinstance(layer, MoELayer)
    gate = layer.router.gate
    assert isinstance(gate, Gate)
    draw = make_generator(seed, "bench", shape.name, load)
    x_TD = make_input(load, gate.weight_ED, shape.num_tokens, shape.top_k, draw)
    parts.to(device=device, dtype=dtype)
    return Problem(
        shape=shape,
        load=load,
        seed=seed,
        device=device,
        dtype=dtype,
        dense=dense,
        layer=layer,
        x_TD=x_TD.to(device=device, dtype=dtype),
    )


def make_layer(
    shape: Shape, bank: ExpertBank, router: Router | None = None, capacity_factor: float | None = None
) -> MoELayer:
    """Return moebench's layer: Switch for k=1, top-k above."""
    capacity = Capacity(train=capacity_factor, eval=capacity_factor)
    options = LayerOptions(experts_per_token=shape.top_k, capacity=capacity)
    return MoELayer(router or make_router(shape), bank, options)


def make_router(shape: Shape) -> Router:
    """Return the softmax router of a shape, without noise."""
    name = "switch" if shape.top_k == 1 else "top_k"
    options = {"jitter": 0.0} if shape.top_k == 1 else {"top_k": shape.top_k}
    router_class = ROUTERS.get(name).item
    router_class.check(router_class.Config(name=name, **options), shape.num_experts)
    return router_class(
        router_class.Config(name=name, **options),
        RouterBuildContext(d_model=shape.d_model, num_experts=shape.num_experts),
    )
