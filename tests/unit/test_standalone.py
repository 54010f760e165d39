"""One MoE layer in a model of one's own: every router, shapes, noise, state, losses, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebench import MoERecord, UsageError, balance_loss, moe_layer
from moebench.experts.layouts.every_n import EveryN
from moebench.routing.router import ROUTERS

D_MODEL, NUM_EXPERTS = 16, 8
DATA = {"vocab_size": 50, "num_domains": 3, "sequence_length": 6}
FOR_WHOLE_MODELS = {
    "dense": "has no experts",
    "oracle": "needs a label of each token",
    "thor": "needs two passes over each batch",
    **dict.fromkeys(
        ["reinforce", "routing_networks", "routing_networks_wpl", "conditional_computation", "ponder_net"],
        "needs the task's loss of each token",
    ),
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))


def ids() -> dict[str, Tensor]:
    return {"token_ids": torch.arange(12).view(2, 6), "domain_ids": torch.tensor([0, 2])}


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_router_trains_in_a_plain_layer_or_is_refused(router: str) -> None:
    if router in FOR_WHOLE_MODELS:
        with pytest.raises(UsageError, match=FOR_WHOLE_MODELS[router]):
            moe_layer(D_MODEL, NUM_EXPERTS, router, {"ffn_width": 256}, DATA)
        return
    layer = moe_layer(D_MODEL, NUM_EXPERTS, router, {"ffn_width": 256}, DATA)
    x = tokens(2, 6).requires_grad_()
    y, record = layer(x, step=3, **ids())
    assert y.shape == x.shape
    (y.square().mean() + balance_loss(record)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    layer.after_step(record)
    layer.eval()
    assert layer(x, **ids())[0].isfinite().all()
    dense_flops = 2 * 2 * D_MODEL * 256
    assert math.isclose(layer.flops_per_token, dense_flops, rel_tol=0.02)


def test_a_flat_input_is_one_sequence() -> None:
    layer = moe_layer(D_MODEL, NUM_EXPERTS).eval()
    x = tokens(1, 6)
    assert torch.equal(layer(x)[0], layer(x[0])[0].unsqueeze(0))


def test_forward_stores_nothing() -> None:
    layer = moe_layer(D_MODEL, NUM_EXPERTS, "loss_free")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes = {*vars(layer.layer)}
    _, record = layer(tokens(2, 6), step=0)
    assert {*vars(layer.layer)} == attributes
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.after_step(record)
    assert [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])] == [
        "layer.router.bias_E"
    ]


def test_noise_is_a_function_of_the_step_and_absent_in_evaluation() -> None:
    layer = moe_layer(D_MODEL, NUM_EXPERTS, "noisy_top_k")
    x = tokens(2, 6)
    torch.nn.init.normal_(layer.layer.router.noise_gate.weight_ED, generator=torch.Generator().manual_seed(1))
    first, again, second = (layer(x, step=step)[0] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x, step=7)[0])


def test_the_seed_decides_the_weights_and_a_generator_gives_each_layer_its_own() -> None:
    def weights(seed: int | torch.Generator) -> Tensor:
        return torch.cat([value.flatten() for value in moe_layer(D_MODEL, NUM_EXPERTS, seed=seed).parameters()])

    generator = torch.Generator().manual_seed(0)
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert not torch.equal(weights(generator), weights(generator))


def test_layout_options_set_widths_activation_capacity_and_shared_experts() -> None:
    given = moe_layer(D_MODEL, NUM_EXPERTS, layout={"expert_width": 24, "expert_activation": "swiglu"})
    # Per token: gate 2·16·8, and 2 experts of three 16 x 24 matrices.
    assert given.flops_per_token == 2 * 16 * 8 + 2 * 3 * 2 * 16 * 24
    capacity = moe_layer(D_MODEL, 4, "switch", {"capacity_factor_train": 0.5, "capacity_rule": "megatron"})
    _, record = capacity(tokens(4, 4), step=0)
    assert record.kept.load_E.max() <= 2  # ceil(16 tokens · 1 · 0.5 / 4 experts)
    assert record.num_dropped >= 8
    assert capacity.eval()(tokens(4, 4))[1].num_dropped == 0
    shared = moe_layer(D_MODEL, NUM_EXPERTS, "top_k", {"name": "fine_grained", "split": 2, "ffn_width": 240})
    assert shared.layer.shared is not None


def test_a_layout_config_equals_its_options_as_a_mapping() -> None:
    config = EveryN.Config(n=1, expert_width=24)
    by_config, by_options = (
        moe_layer(D_MODEL, NUM_EXPERTS, layout=layout) for layout in (config, {"expert_width": 24})
    )
    x = tokens(2, 6)
    assert torch.equal(by_config.eval()(x)[0], by_options.eval()(x)[0])


def test_padding_is_routed_nowhere() -> None:
    layer = moe_layer(D_MODEL, NUM_EXPERTS, {"name": "top_k", "top_k": 2})
    mask = torch.tensor([[True] * 6, [True, True] + [False] * 4])
    _, record = layer(tokens(2, 6), step=0, mask=mask)
    assert record.routing.load_E.sum() == 2 * 8


def test_ids_reach_the_routers_that_read_them() -> None:
    count_V = torch.tensor([5, 4, 3, 2])
    layer = moe_layer(D_MODEL, 2, "hash", data={"token_count": count_V})
    # Most frequent first, each to the expert with the smallest load: 0 -> 0, 1 -> 1, 2 -> 1, 3 -> 0.
    _, record = layer(tokens(4), step=0, token_ids=torch.tensor([3, 2, 1, 0]))
    assert record.routing.expert_N.tolist() == [0, 1, 1, 0]
    with pytest.raises(UsageError, match="token_ids: required"):
        layer(tokens(4), step=0)


def test_the_balance_loss_is_the_sum_of_the_raw_losses_times_their_coefficients() -> None:
    router = {"name": "top_k", "top_k": 2, "losses": {"load_balance": 0.5, "z": 0.25}}
    layer = moe_layer(D_MODEL, NUM_EXPERTS, router)
    _, first = layer(tokens(2, 6), step=0)
    _, second = layer(tokens(2, 6, seed=1), step=0)
    expected = 0.5 * first.raw_losses["load_balance"] + 0.25 * first.raw_losses["z"]
    torch.testing.assert_close(balance_loss(first), expected)
    torch.testing.assert_close(balance_loss([first, second]), (balance_loss(first) + balance_loss(second)) / 2)
    without = moe_layer(D_MODEL, NUM_EXPERTS, "random")(tokens(2, 6), step=0)[1]
    assert isinstance(without, MoERecord)
    assert balance_loss(without) == 0
    with pytest.raises(UsageError, match="got no record"):
        balance_loss([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 7}, "d_model must be an even number above 0, got 7"),
        ({"num_experts": 0}, "layout.num_experts must be at least 1, got 0"),
        ({"router": "topk"}, "router.name: 'topk' is unknown. Did you mean 'top_k'?"),
        ({"router": {"top_k": 2}}, "router: needs a name"),
        ({"router": {"name": "top_k", "top_k": 9}}, "router.top_k=9 does not fit layout.num_experts=8"),
        ({"layout": {"capacity": 1}}, "layout.capacity: .* Did you mean 'capacity_rule'?"),
        ({"layout": {"activation": "relu"}}, "model.activation: 'relu'"),
        ({"layout": {"name": "attention"}}, "'attention' has experts outside the feed-forward part"),
        ({"layout": {"name": "whole_model"}}, "'whole_model' has experts outside"),
        ({"data": {"vocab": 3}}, "data: 'vocab' is unknown. Did you mean 'vocab_size'?"),
        ({"router": "hash"}, "'hash' routes by token id"),
        ({"d_model": "16"}, "d_model must be an even number above 0, got '16'"),
        ({"layout": "fine_grained"}, "layout must be a mapping of options or a LayoutConfig, got 'fine_grained'"),
        ({"data": [1]}, r"data must be a mapping, got \[1\]"),
        ({"data": {"vocab_size": -1}}, "data.vocab_size must be a whole number above 0, got -1"),
        (
            {"data": {"vocab_size": 3, "token_count": [1, 2]}},
            "data.vocab_size must be 2, as token_count .*, got 3",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        moe_layer(**{"d_model": D_MODEL, "num_experts": NUM_EXPERTS} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (tokens(2, 6), {}, "step: required in training mode"),
        (tokens(2, 6)[..., :8], {"step": 0}, r"x must be \(B, L, 16\) or \(T, ...\), got \(2, 6, 8\)"),
        (tokens(2, 6).tolist(), {"step": 0}, "x must be a tensor, got list"),
        (tokens(2, 6).bfloat16(), {"step": 0}, "x must be torch.float32 .* torch.autocast, got torch.bfloat16"),
        (tokens(2, 6), {"step": 0, "mask": torch.ones(2, 6)}, "mask must be torch.bool, got torch.float32"),
        (tokens(2, 6), {"step": 0, "mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must be \(2, 6\), got \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moe_layer(D_MODEL, NUM_EXPERTS)(x, **options)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (None, "token_ids: required"),
        (torch.full((2, 6), 50), "token_ids must be 0 to 49, got 50 to 50"),
        (torch.full((2, 6), -1), "token_ids must be 0 to 49, got -1 to -1"),
        (torch.ones(2, 6), "token_ids must be an int64 tensor, got torch.float32"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(token_ids: Tensor | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moe_layer(D_MODEL, NUM_EXPERTS, "hash", data=DATA)(tokens(2, 6), step=0, token_ids=token_ids)


def test_domains_held_out_of_training_are_accepted_in_evaluation_alone() -> None:
    layer = moe_layer(D_MODEL, NUM_EXPERTS, "limoe", data=DATA)
    held_out = torch.tensor([0, 3])
    with pytest.raises(UsageError, match="domain_ids must be 0 to 2, got 0 to 3"):
        layer(tokens(2, 6), step=0, token_ids=ids()["token_ids"], domain_ids=held_out)
    assert layer.eval()(tokens(2, 6), token_ids=ids()["token_ids"], domain_ids=held_out)[0].isfinite().all()


def test_domain_ids_are_ignored_where_the_layer_was_built_without_domains() -> None:
    _, record = moe_layer(D_MODEL, NUM_EXPERTS, "limoe")(tokens(2, 6), step=0, domain_ids=torch.tensor([0, 7]))
    assert balance_loss(record).isfinite()


def test_vectors_of_another_precision_work_within_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe_layer(D_MODEL, NUM_EXPERTS)(tokens(2, 6).bfloat16(), step=0)[0].dtype == torch.bfloat16


def test_the_balance_loss_refuses_what_is_no_record() -> None:
    with pytest.raises(UsageError, match="balance_loss: got tuple"):
        balance_loss(moe_layer(D_MODEL, NUM_EXPERTS)(tokens(2, 6), step=0))
