"""DSelect-k: smooth steps, decoding of selectors, losses, initial bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route
from support.identity_gates import build_identity_router, record_of

from moebench.errors import UsageError
from moebench.models.transformer import init_weights
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.routers.dselect_k import decode_selectors, smooth_step


def test_smooth_step_by_hand() -> None:
    # S(.25) = -2/64 + 3/8 + 1/2 = .84375, and S(-z) = 1 - S(z); the slope at the ends is 0.
    z = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], requires_grad=True)
    assert smooth_step(z, 1.0).tolist() == [0.0, 0.0, 0.15625, 0.5, 0.84375, 1.0, 1.0]
    assert smooth_step(4 * z, 4.0).tolist() == smooth_step(z, 1.0).tolist()
    (slope,) = torch.autograd.grad(smooth_step(z, 1.0).sum(), z)
    assert slope.tolist() == pytest.approx([0, 0, 1.125, 1.5, 1.125, 0, 0])


def test_decode_selectors_by_hand() -> None:
    # Bits (lowest first) 1, 0, 1 are expert 5; a middle bit of 1/2 splits between 5 and 7.
    bits_TKb = torch.tensor([[[1.0, 0.0, 1.0], [1.0, 0.5, 1.0]]])
    selected_TKE = decode_selectors(bits_TKb, 8)
    assert selected_TKE[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert selected_TKE[0, 1].tolist() == [0, 0, 0, 0, 0, 0.5, 0, 0.5]


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 99))
def test_selector_weights_sum_to_1_if_e_is_a_power_of_two(top_k: int, num_experts: int, seed: int) -> None:
    bits = torch.rand(5, top_k, (num_experts - 1).bit_length(), generator=torch.Generator().manual_seed(seed))
    sums_TK = decode_selectors(bits, num_experts).sum(-1)
    assert (sums_TK <= 1 + 1e-5).all()
    if num_experts & (num_experts - 1) == 0:
        torch.testing.assert_close(sums_TK, torch.ones_like(sums_TK))


def test_saturated_bits_select_k_experts_and_initial_bits_all() -> None:
    router = Case("dselect_k").router()
    with torch.no_grad():
        router.bit_gate.weight_ED.mul_(1e6)
    saturated = route(router, Tokens.draw(64), training=True)
    assert saturated.experts_per_token_T.max() <= 2
    assert router.losses(record_of(saturated))["selector_entropy"].item() == pytest.approx(0, abs=1e-4)
    fresh = route(Case("dselect_k").fresh_router(), Tokens.draw(64), training=True)
    assert (fresh.experts_per_token_T == 8).all()
    # Each of two selectors is uniform over 8: 2 ln 8.
    entropy = router.losses(record_of(fresh))["selector_entropy"].item()
    assert entropy == pytest.approx(2 * math.log(8), rel=1e-2)


def test_lost_weight_and_its_gradient_match_the_source() -> None:
    # S(.3) = -2 · .027 + .45 + .5 = .896 for both bits: expert 0 has .104², 1 and 2 have .896 · .104, together .197;
    # 1 / .197 - 1 = 4.07. The source's gradient of 1 / Σ with respect to each weight of the first feature is 22.12.
    router_class = ROUTERS.get("dselect_k").item
    router = router_class(router_class.Config(top_k=1), RouterBuildContext(d_model=2, num_experts=3))
    with torch.no_grad():
        router.bit_gate.weight_ED.copy_(torch.tensor([[0.3, 0.0], [0.3, 0.0]]))
    routing = router(torch.tensor([[1.0, 0.0]]), Tokens.draw(1).context(training=True))
    losses = router.losses(record_of(routing))
    assert losses["lost_weight"].item() == pytest.approx(1 / 0.197184 - 1, rel=1e-4)
    assert losses["selector_entropy"].item() == pytest.approx(
        -sum(p * math.log(p) for p in (0.104**2, 0.896 * 0.104, 0.896 * 0.104)), rel=1e-4
    )
    total = sum(router.config.losses[name] * loss for name, loss in losses.items())
    (gradient_ED,) = torch.autograd.grad(total, router.bit_gate.weight_ED)
    assert gradient_ED[:, 0].tolist() == pytest.approx([22.1226, 22.1226], rel=1e-4)
    assert not gradient_ED[:, 1].any()


def test_no_weight_is_lost_if_e_is_a_power_of_two() -> None:
    for num_experts, lost in ((8, False), (9, True)):
        router = Case("dselect_k", num_experts).router()
        loss = router.losses(record_of(route(router, Tokens.draw(16), training=True)))["lost_weight"]
        assert bool(loss > 0.1) is lost
        assert bool(loss == 0) is not lost


def test_initial_bit_logits_have_the_sources_spread() -> None:
    # U(-γ/100, γ/100) has standard deviation γ/173: at d = 64, logits of .046 for tokens of unit variance.
    router_class = ROUTERS.get("dselect_k").item
    router = router_class(router_class.Config(gamma=2.0), RouterBuildContext(d_model=64, num_experts=16))
    init_weights(router, 0)
    x_TD = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert router.bit_gate(x_TD).std().item() == pytest.approx(2 * 0.0462, rel=0.1)


@pytest.mark.parametrize(
    ("num_experts", "options", "message"),
    [
        (1, {"top_k": 1}, r"layout\.num_experts must be at least 2"),
        (8, {"gamma": 0.0}, r"router\.gamma must be greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(num_experts: int, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        build_identity_router("dselect_k", num_experts, **options)
