"""Mixture of depths: selection, weights, training of the predictor, cost."""

import dataclasses
import math

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, randomise_parameters, run
from support.layout_models import LENGTH, backbone_of, batch, config_of

from moebench.errors import UsageError
from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.experts.reference import double_loop
from moebench.models.cost import compute_cost


def layer_of(num_experts: int = 8, **options) -> MoELayer:
    return Case("mixture_of_depths", num_experts, options).layer()


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.125, 2), (0.5, 8), (0.7, 11), (1.0, 16)])
def test_training_selects_exactly_c_tokens_per_sequence(share: float, expected: int) -> None:
    _, record = run(layer_of(share=share), Tokens.draw(48, length=16), training=True)
    assert record.routing.experts_per_token_T.view(3, 16).sum(1).tolist() == [expected] * 3
    assert record.routing.experts_per_token_T.max() == 1


def test_selection_and_weights_by_hand() -> None:
    layer = layer_of(2, share=0.5)
    router = layer.router
    with torch.no_grad():
        router.depth.weight_ED.copy_(torch.eye(1, D_MODEL))  # r is the first number of x
        router.gate.weight_ED.copy_(torch.eye(3, D_MODEL)[1:])  # the logits are the second and the third
    x_TD = torch.zeros(4, D_MODEL)
    x_TD[:, 0] = torch.tensor([0.0, 3.0, -1.0, 1.0])
    x_TD[1, 1], x_TD[3, 2] = math.log(3), math.log(4)
    _, record = run(layer, dataclasses.replace(Tokens.draw(4), x_TD=x_TD), training=True)
    assert record.routing.token_N.tolist() == [1, 3]
    assert record.routing.expert_N.tolist() == [0, 1]
    sigmoid = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))]
    assert record.routing.weight_N.tolist() == pytest.approx([sigmoid[0] * 3 / 4, sigmoid[1] * 4 / 5])


@pytest.mark.parametrize("training", [True, False])
def test_skipped_tokens_get_zero_output(training: bool) -> None:
    y_TD, record = run(layer_of(), Tokens.draw(64, length=16), training=training)
    served_T = record.kept.experts_per_token_T > 0
    assert 0 < served_T.sum() < 64
    assert not y_TD[~served_T].any()
    assert (y_TD[served_T].abs().sum(-1) > 0).all()


def test_share_counts_valid_tokens_only() -> None:
    valid_T = torch.arange(32) % 16 < torch.tensor([6, 16]).repeat_interleave(16)
    tokens = dataclasses.replace(Tokens.draw(32, length=16), valid_T=valid_T)
    _, record = run(layer_of(share=0.5), tokens, training=True)
    assert record.routing.experts_per_token_T.view(2, 16).sum(1).tolist() == [3, 8]


def test_task_loss_trains_gates_and_membership_trains_the_predictor() -> None:
    layer, tokens = layer_of(), Tokens.draw(64, length=16)
    tokens.x_TD.requires_grad_()
    y_TD, record = run(layer, tokens, training=True)
    named = dict(layer.router.named_parameters())
    leaves = [*named.values(), tokens.x_TD]
    task_gradients, membership_gradients = (
        torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        for loss in (y_TD.square().sum(), layer.router.losses(record)["membership"])
    )
    reached = [
        {name for name, g in zip([*named, "x"], gradients, strict=True) if g is not None}
        for gradients in (task_gradients, membership_gradients)
    ]
    assert reached[0] == {"depth.weight_ED", "gate.weight_ED", "x"}
    assert reached[1] == {"predictor_in.weight_ED", "predictor_out.weight_ED"}


def test_membership_by_hand() -> None:
    router = layer_of(share=0.5).router
    with torch.no_grad():
        router.predictor_out.weight_ED.zero_()
    _, record = run(layer_of(share=0.5), Tokens.draw(8), training=True)
    logit_T = torch.tensor([2.0, -1.0]).log()[:1].expand(4)  # p = 2/3 for all four, two of which are selected
    extras = {"predicted_T": logit_T, "first_T": torch.tensor([True, True, False, False])}
    routing = dataclasses.replace(record.routing, token_extras=extras, num_tokens=4)
    loss = router.losses(dataclasses.replace(record, routing=routing))["membership"]
    assert loss.item() == pytest.approx(-(math.log(2 / 3) + math.log(1 / 3)) / 2)


def test_predictor_reproduces_the_selection_in_evaluation() -> None:
    layer = layer_of(share=0.5)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    for step in range(300):
        _, record = run(layer, Tokens.draw(256, seed=step, length=256), training=True)
        optimizer.zero_grad()
        layer.router.losses(record)["membership"].backward()
        optimizer.step()
    tokens = Tokens.draw(512, seed=999, length=512)
    _, chosen = run(layer, tokens, training=True)
    _, predicted = run(layer, tokens, training=False)
    same_T = chosen.kept.experts_per_token_T == predicted.kept.experts_per_token_T
    assert same_T.float().mean() > 0.93  # the threshold varies a little between sequences


def test_one_expert_with_all_tokens_and_weight_1_is_dense() -> None:
    layer, dense = layer_of(1, share=1.0), FeedForward(D_MODEL, 8, "gelu")
    tokens = dataclasses.replace(Tokens.draw(16), x_TD=Tokens.draw(16).x_TD.abs())
    with torch.no_grad():
        layer.router.depth.weight_ED.fill_(1e4)
        dense.w_in_DF.copy_(layer.bank.w_in_EDF[0])
        dense.w_out_FD.copy_(layer.bank.w_out_EFD[0])
    y_TD, record = run(layer, tokens, training=True)
    torch.testing.assert_close(y_TD, dense(tokens.x_TD))
    torch.testing.assert_close(y_TD, double_loop(layer.bank, tokens.x_TD, record.kept))


def test_cost_is_proportional_to_the_share() -> None:
    layer = layer_of(share=0.25)
    expert, router = 2 * 2 * 8 * 8, 2 * (8 + 8 * 8 + 16 * 8 + 16)
    assert layer.flops_per_token() == expert // 4 + router
    backbone = backbone_of(config_of("every_n", {"name": "mixture_of_depths", "share": 0.25}, match="none"))
    cost = compute_cost(backbone, [], LENGTH)
    experts = sum(p.numel() for layer in backbone.moe_layers() for p in layer.bank.parameters())
    assert cost.total_params - cost.active_params == experts * 31 // 32  # a quarter of one of eight


@pytest.mark.parametrize(("layout", "rows"), [("prototypes", 4 * 0.5), ("hierarchical", 0.5 * 0.5)])
def test_share_in_groups(layout: str, rows: float) -> None:
    # Each of four prototypes selects half of the tokens; two levels select half, and half of these.
    backbone = randomise_parameters(backbone_of(config_of(layout, "mixture_of_depths", groups=4)))
    x_BLD, ctx = batch(training=True)
    _, records = backbone(x_BLD, ctx)
    for layer, record in zip(backbone.moe_layers(), records, strict=True):
        assert layer.router.rows_per_token(layer.experts_per_token) == rows
        rows_per_token = record.kept.load_E.sum().item() / (2 * LENGTH)
        # The share of the tokens sent to a group is rounded down, to at least one.
        assert rows_per_token == pytest.approx(rows, abs=0 if layout == "prototypes" else 8 / (2 * LENGTH))


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"predictor_width": 0}])
def test_options_out_of_range_are_refused(options) -> None:
    case = Case("mixture_of_depths", 8, options)
    key = next(iter(options))
    with pytest.raises(UsageError, match=rf"router\.{key}"):
        case.router_class.check(case.config, 8)
