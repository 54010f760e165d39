"""Initial feed-forward weights drawn unit by unit: a dense network starts as the first experts side by side."""

from typing import Any

import pytest
import torch

from moebench.config import resolve
from moebench.experts.layer import MoELayer
from moebench.experts.mixed import MixedBank
from moebench.models.build import build_backbone
from moebench.models.paired_init import pair_initial_weights
from moebench.models.transformer import init_weights

MODEL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "ffn_width": 64, "ffn_init": "by_unit"}


def build(router: str, layout: dict[str, Any] | None = None, seed: int = 3, **model: Any) -> list[Any]:
    """Return the feed-forward parts of a model with paired weights."""
    raw = {
        "model": {**MODEL, **model},
        "router": {"name": router},
        "layout": {"num_experts": 4, **(layout or {"name": "every_n", "n": 1})},
    }
    backbone = build_backbone(resolve(raw), causal=True)
    init_weights(backbone, seed)
    pair_initial_weights(backbone, seed)
    return [block.feed_forward for block in backbone.blocks]  # type: ignore[union-attr]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_dense_network_is_the_first_experts_side_by_side(activation: str) -> None:
    dense, experts = (
        build("dense", activation=activation),
        build("top_k", {"n": 1, "expert_width": 32}, activation=activation),
    )
    for network, layer in zip(dense, experts, strict=True):
        x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        # Outputs of experts are drawn larger, by the root of the ratio of widths.
        both_TD = layer.bank.expert(x_TD, 0) + layer.bank.expert(x_TD, 1)
        torch.testing.assert_close(network(x_TD), both_TD * (32 / 64) ** 0.5)


def test_blocks_and_seeds_differ() -> None:
    first, second = build("dense")
    assert not torch.equal(first.w_in_DF, second.w_in_DF)
    assert not torch.equal(first.w_in_DF, build("dense", seed=4)[0].w_in_DF)
    assert torch.equal(first.w_in_DF, build("dense")[0].w_in_DF)


def test_scales_are_those_of_separate_networks() -> None:
    for layer in build("switch", {"n": 1, "num_experts": 16}, ffn_width=256, d_model=64):
        width = layer.bank.w_out_EFD.shape[1]
        assert layer.bank.w_in_EDF.std().item() == pytest.approx(64**-0.5, rel=0.02)
        assert layer.bank.w_out_EFD.std().item() == pytest.approx(layer.bank.out_scale * width**-0.5, rel=0.02)
        assert not torch.equal(layer.bank.w_in_EDF[0], layer.bank.w_in_EDF[1])


def test_shared_experts_take_the_first_units() -> None:
    [layer, _] = build("top_k", {"name": "fine_grained", "num_experts": 4, "split": 2, "shared": 1})
    assert isinstance(layer, MoELayer)
    assert layer.shared is not None
    dense = build("dense")[0]
    width = min(layer.shared.w_in_DF.shape[1], 64)
    assert torch.equal(layer.shared.w_in_DF[:, :width], dense.w_in_DF[:, :width])


def test_groups_of_different_experts_follow_each_other() -> None:
    [layer, _] = build("top_k", {"name": "heterogeneous", "num_experts": 4})
    assert isinstance(layer.bank, MixedBank)
    dense, first = build("dense", ffn_width=128)[0], layer.bank.groups[0]
    assert torch.equal(first.w_in_EDF[0], dense.w_in_DF[:, : first.w_in_EDF.shape[2]])


def test_other_weights_are_as_without_the_option() -> None:
    config = resolve({"model": MODEL, "router": {"name": "switch"}, "layout": {"name": "every_n", "num_experts": 4}})
    paired, separate = (build_backbone(config, causal=True) for _ in range(2))
    for model in (paired, separate):
        init_weights(model, 0)
    pair_initial_weights(paired, 0)
    others, drawn = dict(separate.named_parameters()), dict(paired.named_parameters())
    differing = {name for name, value in others.items() if not torch.equal(value, drawn[name])}
    assert differing == {name for name in others if name.rsplit(".", 1)[-1].startswith(("w_in_", "w_out_"))}
