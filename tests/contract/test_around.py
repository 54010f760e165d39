"""Shared experts, the residual mixture, dropout and recomputation, for every router."""

from dataclasses import replace

import pytest
import torch
from support.case_selection import parametrize_cases
from support.cases import D_MODEL, Case, Tokens, cases_of, randomise_parameters, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moebench.experts.activation import Dropout
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import MoELayer
from moebench.models.transformer import init_weights

every_case = parametrize_cases(cases_of(8))


def build_layer(case: Case, *, residual: bool, rate: float = 0.0, capacity: Capacity | None = None) -> MoELayer:
    """Build a layer with a shared network."""
    shared = randomise_parameters(FeedForward(D_MODEL, 8, "gelu"), seed=1)
    layer = case.layer(shared=shared, residual=residual, expert_dropout=rate, capacity=capacity)
    if layer.mix is not None:
        randomise_parameters(layer.mix, seed=2)
    return layer


@every_case
def test_shared_experts_are_added(case: Case) -> None:
    layer, tokens = build_layer(case, residual=False), Tokens.draw(24)
    y_TD, record = run(layer, tokens, training=False)
    routed_TD, alone = run(case.layer(), tokens, training=False)
    assert layer.shared is not None
    torch.testing.assert_close(y_TD, routed_TD + layer.shared(tokens.x_TD))
    assert torch.equal(record.kept.load_E, alone.kept.load_E), "shared experts are no part of the routing"


@every_case
def test_residual_mixture_has_weights_that_sum_to_1(case: Case) -> None:
    layer, tokens = build_layer(case, residual=True), Tokens.draw(24)
    y_TD, _ = run(layer, tokens, training=False)
    routed_TD, _ = run(case.layer(), tokens, training=False)
    assert layer.shared is not None
    assert layer.mix is not None
    share_T2 = torch.softmax(tokens.x_TD @ layer.mix.weight_ED.T + layer.mix.bias_E, -1)
    torch.testing.assert_close(y_TD, share_T2[:, :1] * routed_TD + share_T2[:, 1:] * layer.shared(tokens.x_TD))
    (y_TD.square().sum()).backward()
    assert layer.mix.weight_ED.grad is not None
    assert layer.mix.weight_ED.grad.norm() > 1e-3
    assert layer.mix.bias_E is not None
    assert layer.mix.bias_E.grad is not None
    assert layer.mix.bias_E.grad.norm() > 1e-3


def test_dropped_tokens_still_use_the_shared_network() -> None:
    capacity = Capacity(train=0.25)
    layer, tokens = build_layer(Case("switch"), residual=True, capacity=capacity), Tokens.draw(64)
    y_TD, record = run(layer, tokens, training=True)
    unserved_T = record.kept.experts_per_token_T == 0
    assert unserved_T.any()
    assert layer.shared is not None
    assert layer.mix is not None
    share_T1 = torch.softmax(tokens.x_TD @ layer.mix.weight_ED.T + layer.mix.bias_E, -1)[:, 1:]
    torch.testing.assert_close(y_TD[unserved_T], (share_T1 * layer.shared(tokens.x_TD))[unserved_T])


def test_residual_mixture_with_bias_only() -> None:
    # With W_c = 0 and b = (ln 3, 0) the weights are 3/4 for the experts and 1/4 for the shared network.
    layer, tokens = build_layer(Case("switch"), residual=True), Tokens.draw(24)
    assert layer.mix is not None
    assert layer.mix.bias_E is not None
    init_weights(layer.mix, 0)
    assert layer.mix.bias_E.tolist() == [0.0, 0.0], "even at the start"
    with torch.no_grad():
        layer.mix.weight_ED.zero_()
        layer.mix.bias_E.copy_(torch.tensor([3.0, 1.0]).log())
    y_TD, _ = run(layer, tokens, training=False)
    routed_TD, _ = run(Case("switch").layer(), tokens, training=False)
    assert layer.shared is not None
    torch.testing.assert_close(y_TD, 0.75 * routed_TD + 0.25 * layer.shared(tokens.x_TD))


def test_flops_include_the_shared_network_and_its_gate() -> None:
    alone = Case("top_k").layer().flops_per_token()
    shared = 2 * 2 * 8 * 8  # two 8 x 8 matrices
    assert build_layer(Case("top_k"), residual=False).flops_per_token() == alone + shared
    assert build_layer(Case("top_k"), residual=True).flops_per_token() == alone + shared + 2 * 2 * 8


def test_residual_gate_is_initialised_from_the_seed() -> None:
    layers = [build_layer(Case("switch"), residual=True) for _ in range(3)]
    for layer, seed in zip(layers, (0, 0, 1), strict=True):
        init_weights(layer, seed)
    weights = [layer.mix.weight_ED for layer in layers if layer.mix is not None]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].abs().max() > 0


def test_residual_gate_is_fp32_under_autocast() -> None:
    layer, tokens = build_layer(Case("switch"), residual=True), Tokens.draw(24)
    y_TD, _ = run(layer, tokens, training=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_TD, _ = run(layer, tokens, training=False)
    torch.testing.assert_close(half_TD.float(), y_TD, rtol=0.1, atol=0.1)


@every_case
def test_dropout_is_off_at_rate_0_and_in_evaluation(case: Case) -> None:
    tokens = Tokens.draw(24)
    for rate, training in ((0.0, True), (0.5, False)):
        plain_TD, _ = run(build_layer(case, residual=False), tokens, training=training)
        y_TD, _ = run(build_layer(case, residual=False, rate=rate), tokens, training=training)
        assert torch.equal(plain_TD, y_TD)


@every_case
def test_dropout_depends_on_its_generator_and_not_the_routing(case: Case) -> None:
    layer, tokens = build_layer(case, residual=False, rate=0.5), Tokens.draw(24)
    first_TD, record = run(layer, tokens, training=True, seed=3)
    torch.manual_seed(999)
    second_TD, _ = run(layer, tokens, training=True, seed=3)
    other_TD, _ = run(layer, tokens, training=True, seed=4)
    _, plain = run(build_layer(case, residual=False), tokens, training=True, seed=3)
    assert torch.equal(first_TD, second_TD)
    assert not torch.equal(first_TD, other_TD)
    if not case.is_chain:  # there the router reads what the experts made of a token
        assert torch.equal(record.kept.load_E, plain.kept.load_E)


def test_shared_experts_have_dropout_too() -> None:
    layer, tokens = build_layer(Case("switch"), residual=False, rate=0.5), Tokens.draw(24)
    with torch.no_grad():
        layer.bank.w_out_EFD.zero_()  # what is left is the shared network
    y_TD, _ = run(layer, tokens, training=True)
    assert layer.shared is not None
    assert ((y_TD - layer.shared(tokens.x_TD)).abs().amax(-1) > 0).all()


def test_dropout_by_hand() -> None:
    hidden_RF = torch.ones(400, 500, requires_grad=True)
    dropped_RF = Dropout(rate=0.2, generator=torch.Generator().manual_seed(0))(hidden_RF)
    assert dropped_RF.unique().tolist() == [0.0, 1.25]
    # 200,000 draws: the standard deviation of the share is 0.0009.
    assert (dropped_RF == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert dropped_RF.mean().item() == pytest.approx(1.0, abs=0.005)
    dropped_RF.sum().backward()
    assert torch.equal(hidden_RF.grad, dropped_RF), "the gradient of what is kept is 1 / (1 - rate)"


def test_dropout_preserves_the_mean_output() -> None:
    # The output is linear in the hidden activations, so its mean over draws is the output without dropout.
    bank, x_RD, load_E = ExpertBank(D_MODEL, 8, 2, "gelu"), Tokens.draw(6).x_TD, torch.tensor([4, 2])
    init_weights(bank, 0)
    dropout = Dropout(rate=0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        draws = torch.stack([bank.rows(x_RD, load_E, dropout) for _ in range(3000)])
        plain_RD = bank.rows(x_RD, load_E)
    error_RD = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - plain_RD).abs() < 5 * error_RD).all()
    assert (error_RD > 0).all(), "every row of every expert is dropped from"


@every_case
def test_recomputation_is_bit_identical_and_counts_once(case: Case) -> None:
    overflow = "pass" if case.is_soft or not case.facts.makes_scores else "reroute"
    capacity, results = Capacity(train=1.0, overflow=overflow), []
    for recompute in (False, True):
        layer = build_layer(case, residual=True, rate=0.3, capacity=capacity)
        layer.train()
        tokens = Tokens.draw(16)
        x_TD, records = tokens.x_TD.requires_grad_(), []

        def forward(x_TD: Tensor, layer: MoELayer = layer, tokens: Tokens = tokens, records: list = records) -> Tensor:
            y_TD, record = layer(x_TD, replace(tokens, x_TD=x_TD).context(training=True))
            records.append(record)
            return y_TD

        with set_checkpoint_early_stop(False):  # to the end of the layer, so that there is a second record
            y_TD = checkpoint(forward, x_TD, use_reentrant=False) if recompute else forward(x_TD)
            y_TD.square().sum().backward()
        assert len(records) == 1 + recompute
        loads = [record.kept.load_E for record in records]
        assert all(torch.equal(load_E, loads[0]) for load_E in loads)
        results.append([y_TD, loads[0], x_TD.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
