"""The whole MoE layer against plain loops on arbitrary routings: capacity, overflow, shared experts, the residual."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import D_MODEL, ReplayRouter, Tokens, assert_same_gradients, randomise_parameters
from support.routing_strategies import crowded_routings, make_generator, rectangles, routings
from torch import Tensor

from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import double_loop
from moebench.routing.values import LayerRecord, Routing

pytestmark = pytest.mark.usefixtures("kernels_for_few_rows")
any_routing = st.one_of(crowded_routings, routings(holes=True, scored=True), rectangles(holes=True, scored=True))
capacities = st.builds(
    Capacity,
    train=st.sampled_from([None, 0.25, 0.5, 1.0, 2.0]),
    drop_order=st.sampled_from(["router", "position", "score", "random"]),
    rule=st.sampled_from(["megatron", "vmoe", "switch", "deepspeed"]),
    overflow=st.sampled_from(["drop", "reroute", "pass"]),
)
around = st.sampled_from([{}, {"shared": True}, {"shared": True, "residual": True}])


@dataclass(frozen=True)
class Drawn:
    """A layer that replays a drawn routing, its input, and all that gets a gradient."""

    layer: MoELayer
    tokens: Tokens
    leaves: list[Tensor]
    valid_T: Tensor | None

    @classmethod
    def of(cls, routing: Routing, capacity: Capacity, around: dict[str, bool], padded: bool) -> "Drawn":
        weight_N, score_TE = routing.weight_N.clone(), routing.scores_TE.clone()
        leaves = [weight_N.requires_grad_(), score_TE.requires_grad_()]
        counted_N = routing.counted_N  # assignments that do not count have weight 0
        routing = replace(routing, weight_N=weight_N.where(counted_N, 0.0), scores_TE=score_TE)
        bank = randomise_parameters(ExpertBank(D_MODEL, 4, routing.num_experts, "gelu"))
        shared = randomise_parameters(FeedForward(D_MODEL, 4, "gelu"), seed=1) if around.get("shared") else None
        options = LayerOptions(
            experts_per_token=routing.top_k or 1, capacity=capacity, residual=around.get("residual", False)
        )
        layer = MoELayer(ReplayRouter(routing), bank, options, shared=shared)
        if layer.mix is not None:
            randomise_parameters(layer.mix, seed=2)
        valid_T = torch.rand(routing.num_tokens, generator=make_generator(5)) < 0.7 if padded else None
        tokens = replace(Tokens.draw(routing.num_tokens), valid_T=valid_T)
        tokens.x_TD.requires_grad_()
        return cls(layer, tokens, [tokens.x_TD, *leaves, *layer.parameters()], valid_T)

    def run(self) -> tuple[Tensor, LayerRecord]:
        result: tuple[Tensor, LayerRecord] = self.layer(self.tokens.x_TD, self.tokens.context(training=True))
        return result

    def slow(self, record: LayerRecord) -> Tensor:
        """Return the output by loops over assignments and tokens."""
        x_TD, layer = self.tokens.x_TD, self.layer
        tokens = list(double_loop(layer.bank, x_TD, record.kept))
        if layer.capacity.overflow == "pass":
            lost_N = record.routing.counted_N & ~record.kept.counted_N
            for n in torch.nonzero(lost_N).flatten().tolist():
                token = int(record.routing.token_N[n])
                tokens[token] = tokens[token] + record.routing.weight_N[n] * x_TD[token]
        if layer.shared is not None:
            shared = [layer.shared(x_D) for x_D in x_TD]
            if layer.mix is None:
                tokens = [y_D + s_D for y_D, s_D in zip(tokens, shared, strict=True)]
            else:
                share = [torch.softmax(layer.mix.weight_ED @ x_D + layer.mix.bias_E, 0) for x_D in x_TD]
                tokens = [c[0] * y_D + c[1] * s_D for c, y_D, s_D in zip(share, tokens, shared, strict=True)]
        return torch.stack(tokens) if tokens else x_TD * 0


@given(any_routing, capacities, around, st.booleans())
def test_layer_is_the_loop(routing: Routing, capacity: Capacity, around: dict[str, bool], padded: bool) -> None:
    drawn = Drawn.of(routing, capacity, around, padded)
    y_TD, record = drawn.run()
    assert_same_gradients(y_TD, drawn.slow(record), drawn.leaves, rtol=1e-5, atol=1e-5)


@given(any_routing, capacities, st.booleans())
def test_counts_sum_to_the_assignments(routing: Routing, capacity: Capacity, padded: bool) -> None:
    drawn = Drawn.of(routing, capacity, {}, padded)
    _, record = drawn.run()
    valid_T = torch.ones(routing.num_tokens, dtype=torch.bool) if drawn.valid_T is None else drawn.valid_T
    wanted_N = routing.counted_N & valid_T[routing.token_N]
    assert int(record.routing.load_E.sum()) == int(record.routing.experts_per_token_T.sum()) == int(wanted_N.sum())
    assert int(record.kept.load_E.sum()) + record.num_dropped == int(wanted_N.sum())
    assert record.num_unserved == int(((record.kept.experts_per_token_T == 0) & valid_T).sum())
    if capacity.overflow != "reroute":
        assert record.num_rerouted == 0
    slots = capacity.slots(
        training=True,
        num_tokens=int(valid_T.sum()),
        experts_per_token=routing.top_k or 1,
        num_experts=routing.num_experts,
    )
    assert record.num_dropped == 0 if slots is None else bool((record.kept.load_E <= slots).all())


@given(any_routing, capacities, around)
def test_layer_repeats_bit_for_bit(routing: Routing, capacity: Capacity, around: dict[str, bool]) -> None:
    drawn, results = Drawn.of(routing, capacity, around, False), []
    for _ in range(2):
        y_TD, _ = drawn.run()
        gradients: tuple[Tensor | None, ...] = (None,)
        if y_TD.requires_grad:
            gradients = torch.autograd.grad(y_TD.square().sum(), drawn.leaves, allow_unused=True, retain_graph=True)
        results.append([y_TD, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


class Identity(Bank):
    """Experts that give their rows back."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        assert int(load_E.sum()) == x_RD.shape[0]
        return x_RD

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        return x_RD

    def flops_per_row_E(self) -> tuple[int, ...]:
        return (0,) * self.num_experts


@given(any_routing, capacities)
def test_identity_experts_give_the_tokens_times_their_weights(routing: Routing, capacity: Capacity) -> None:
    options = LayerOptions(experts_per_token=routing.top_k or 1, capacity=capacity)
    layer = MoELayer(ReplayRouter(routing), Identity(routing.num_experts), options)
    tokens = Tokens.draw(routing.num_tokens)
    y_TD, record = layer(tokens.x_TD, tokens.context(training=True))
    # Passed on unchanged is what an identity expert does, so `pass` loses nothing here.
    weights = record.routing if capacity.overflow == "pass" else record.kept
    weight_T = torch.zeros(routing.num_tokens)
    for token, weight in zip(weights.token_N.tolist(), weights.weight_N.tolist(), strict=True):
        weight_T[token] += weight
    torch.testing.assert_close(y_TD, weight_T[:, None] * tokens.x_TD)


def test_residual_without_a_shared_network_is_refused() -> None:
    routing = Routing.from_top_k(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), num_experts=1)
    with pytest.raises(ValueError, match="residual=True"):
        MoELayer(ReplayRouter(routing), Identity(1), LayerOptions(experts_per_token=1, residual=True))
