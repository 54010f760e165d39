"""MoE++: the heterogeneous loss, the gating residual between layers, and zero-computation experts."""

import dataclasses

import pytest
import torch
from support.cases import Tokens, build_context, randomise_parameters
from support.layout_models import backbone_of, batch, config_of
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.models.transformer import Transformer
from moebench.routing.features.networkless_experts import NetworklessExperts
from moebench.routing.features.previous_logits import PreviousLogits
from moebench.routing.layer_name import LayerName
from moebench.routing.losses import load_balance
from moebench.routing.routers.moe_plus_plus import MoEPlusPlus
from moebench.routing.values import LayerRecord, Routing

FREE = (False, False, True, True)


def router_of(free_E: tuple[bool, ...] = FREE, **options) -> MoEPlusPlus:
    at = dataclasses.replace(build_context(len(free_E)), features={NetworklessExperts: free_E})
    return randomise_parameters(MoEPlusPlus(MoEPlusPlus.Config(**options), at))


def record_of(expert_T: list[int], scores_TE: Tensor) -> LayerRecord:
    expert_TK = torch.tensor(expert_T).unsqueeze(-1)
    routing = Routing.from_top_k(
        expert_TK, torch.ones(len(expert_T), 1), num_experts=scores_TE.shape[1], scores_TE=scores_TE
    )
    return LayerRecord(routing=routing, kept=routing)


def loss_of(router: MoEPlusPlus, record: LayerRecord) -> float:
    return router.losses(record)["heterogeneous_balance"].item()


def test_loss_by_hand() -> None:
    router = router_of(tau=0.5)
    assert loss_of(router, record_of([0, 1, 2, 3], torch.full((4, 4), 0.25))) == pytest.approx(1)
    # η = 1, 1, .5, .5, whose sum is 3: all on one expert is E² η / 3.
    assert loss_of(router, record_of([0] * 4, torch.eye(4)[[0] * 4])) == pytest.approx(16 / 3)
    assert loss_of(router, record_of([3] * 4, torch.eye(4)[[3] * 4])) == pytest.approx(16 / 3 / 2)


def test_loss_is_minimal_for_loads_proportional_to_1_over_eta() -> None:
    # With f = P the sum Σ η f² is minimal at f ∝ 1/η = (1, 1, 2, 2) / 6.
    router = router_of(tau=0.5)
    expert_T = [0, 1, 2, 2, 3, 3]
    best = loss_of(router, record_of(expert_T, torch.tensor([[1.0, 1, 2, 2]]).expand(6, 4) / 6))
    assert best == pytest.approx(16 / 3 * (1 / 36 + 1 / 36 + 2 / 36 + 2 / 36))
    assert best < 1


def test_loss_without_free_experts_equals_load_balance() -> None:
    scores_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    record = record_of([0, 0, 1, 2, 2, 2], scores_TE)
    assert loss_of(router_of((False,) * 4), record) == pytest.approx(load_balance(record).item())


def backbone(layout: str = "zero_computation", **options) -> Transformer:
    return randomise_parameters(backbone_of(config_of(layout, "moe_plus_plus", **options)))


def layers_of(model: Transformer) -> list[MoELayer]:
    return model.moe_layers()


def test_layout_determines_the_free_experts() -> None:
    for layer in layers_of(backbone(num_experts=4, constant=1)):
        assert layer.router.eta == [1, 1, 1, 1, 0.75, 0.75, 0.75]
        assert [flops > 0 for flops in layer.bank.flops_per_row_E()] == [True] * 4 + [False, False, True]
    for layer in layers_of(backbone("every_n")):
        assert layer.router.eta == [1] * 8


def capture_inputs(layer: MoELayer) -> list[Tensor]:
    """Return a list that collects the inputs of a layer's router."""
    inputs_TD: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, inputs, output: inputs_TD.append(inputs[0]))
    return inputs_TD


def test_gate_adds_the_residual_of_the_layer_below() -> None:
    model = backbone()
    first, second = layers_of(model)
    assert first.router.residual is None
    inputs_TD = capture_inputs(second)
    x_BLD, ctx = batch(training=True)
    _, (below, above) = model(x_BLD, ctx)
    expected_TE = inputs_TD[0] @ second.router.gate.weight_ED.T
    expected_TE = expected_TE + below.routing.logits_TE @ second.router.residual.weight_ED.T
    torch.testing.assert_close(above.routing.logits_TE, expected_TE)


def test_residual_passes_gradients_to_the_layer_below() -> None:
    model = backbone()
    first, second = layers_of(model)
    x_BLD, ctx = batch(training=True)
    inputs_TD = capture_inputs(second)
    for factor in (1.0, 0.0):
        with torch.no_grad():
            second.router.residual.weight_ED.mul_(factor)
        _, (_, above) = model(x_BLD, ctx)
        x_TD = inputs_TD.pop()
        pull = torch.randn(above.routing.logits_TE.shape, generator=torch.Generator().manual_seed(1))
        alone = second.router(x_TD.detach(), ctx.route_in(second, x_BLD)).logits_TE
        through = above.routing.logits_TE - x_TD @ second.router.gate.weight_ED.T
        (grad,) = torch.autograd.grad((through * pull).sum(), [first.router.gate.weight_ED])
        assert (grad.norm().item() > 1e-2) is bool(factor)
        assert torch.allclose(alone, above.routing.logits_TE, atol=1e-5) is not bool(factor)


def test_residual_is_ignored_for_another_number_of_experts() -> None:
    router = randomise_parameters(MoEPlusPlus(MoEPlusPlus.Config(), dataclasses.replace(build_context(4), layer=1)))
    tokens = Tokens.draw(5)
    ctx = tokens.context(training=False)
    alone = router(tokens.x_TD, ctx).logits_TE
    other = router(tokens.x_TD, dataclasses.replace(ctx, features={PreviousLogits: torch.ones(5, 3)})).logits_TE
    same = router(tokens.x_TD, dataclasses.replace(ctx, features={PreviousLogits: torch.ones(5, 4)})).logits_TE
    assert torch.equal(alone, other)
    torch.testing.assert_close(same, alone + router.residual.weight_ED.sum(1))


def test_zero_and_copy_experts_by_hand() -> None:
    layer = layers_of(backbone(num_experts=2, constant=0))[0]  # two networks, zero, copy
    x_TD = Tokens.draw(6).x_TD.repeat(1, 2)
    with torch.no_grad():
        layer.router.gate.weight_ED.zero_()
        layer.router.gate.weight_ED[2:] = torch.tensor([[2.0], [1.0]])
    x_TD = x_TD.abs()
    ctx = batch(training=False, size=1, length=6)[1].route(LayerName(), 6, x_TD.device)
    y_TD, record = layer(x_TD, ctx)
    assert record.routing.load_E.tolist() == [0, 0, 6, 6]
    torch.testing.assert_close(y_TD, record.routing.scores_TE[:, 3:] * x_TD)
