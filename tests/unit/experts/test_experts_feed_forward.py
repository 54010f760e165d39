import math

import pytest
import torch
from support.cases import Case, Tokens, run

from moebench.experts.activation import activate
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.grouped import grouped_matmul
from moebench.experts.layout import LAYOUTS, LayoutConfig
from moebench.models.transformer import init_weights


def test_activations_by_hand() -> None:
    # gelu(1) = Φ(1) = 0.8413; silu(1) · 2 = 2 / (1 + 1/e)
    assert activate(torch.tensor([[1.0, 0.0]]), "gelu")[0].tolist() == pytest.approx([0.841345, 0.0], abs=1e-5)
    assert activate(torch.tensor([[1.0, 2.0]]), "swiglu")[0].tolist() == pytest.approx([2 / (1 + math.exp(-1))])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_bank_and_dense_network_have_the_same_form(activation: str) -> None:
    dense, bank = FeedForward(8, 12, activation), ExpertBank(8, 12, 3, activation)
    assert bank.num_experts == 3
    assert sum(p.numel() for p in bank.parameters()) == 3 * sum(p.numel() for p in dense.parameters())
    assert bank.flops_per_row_E()[0] == dense.flops_per_token() == 2 * sum(p.numel() for p in dense.parameters())


def test_bank_sends_each_run_of_rows_to_its_expert() -> None:
    bank = ExpertBank(8, 12, 3, "gelu")
    init_weights(bank, 0)
    x_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    y_RD = bank.rows(x_RD, torch.tensor([2, 0, 3]))
    torch.testing.assert_close(y_RD[:2], bank.expert(x_RD[:2], 0))
    torch.testing.assert_close(y_RD[2:], bank.expert(x_RD[2:], 2))


def test_grouped_product_follows_autocast() -> None:
    x_RI, weight_EIO = torch.randn(4, 8), torch.randn(2, 8, 8)
    load_E = torch.tensor([1, 3])
    assert grouped_matmul(x_RI, weight_EIO, load_E).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_RO = grouped_matmul(x_RI, weight_EIO, load_E)
        assert half_RO.dtype == (x_RI @ weight_EIO[0]).dtype == torch.bfloat16
    assert grouped_matmul(x_RI.double(), weight_EIO.double(), load_E).dtype == torch.float64


def test_output_scale_is_that_of_the_residual_stream() -> None:
    dense = FeedForward(64, 64, "gelu", out_scale=0.25)
    init_weights(dense, 0)
    assert dense.w_out_FD.std().item() == pytest.approx(0.25 / 8, rel=0.05)
    assert dense.w_in_DF.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS.names())
def test_layouts_place_experts_somewhere(layout: str) -> None:
    entry = LAYOUTS.get(layout)
    assert issubclass(entry.item.Config, LayoutConfig)
    assert entry.facts.placement
    for num_layers in (2, 4, 12):
        plan = entry.item.plan(entry.item.Config(), num_layers)
        assert len(plan) == num_layers or plan[0].stack is not None
        assert any(block.banks for block in plan)


def test_flops_of_a_layer_count_router_and_active_experts() -> None:
    layer = Case("top_k", 8).layer()
    # gate 2·8·8, two experts of two 8x8 matrices each
    assert layer.flops_per_token() == 2 * 64 + 2 * 2 * 2 * 64


def test_recomputation_counts_nothing_twice() -> None:
    # Nothing is stored on a module in forward: activation checkpointing gives the same numbers and state.
    from torch.utils.checkpoint import checkpoint

    case, results = Case("noisy_top_k"), []
    for recompute in (False, True):
        layer, tokens = case.layer(), Tokens.draw(16)
        tokens.x_TD.requires_grad_()

        def forward(x_TD, layer=layer, tokens=tokens):
            return layer(x_TD, tokens.context(training=True))[0]

        y_TD = (
            checkpoint(forward, tokens.x_TD, use_reentrant=False) if recompute else run(layer, tokens, training=True)[0]
        )
        y_TD.square().sum().backward()
        results.append([tokens.x_TD.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
