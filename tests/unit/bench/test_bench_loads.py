"""Forced loads are exact: counts by hand, and the gates that choose from the crafted inputs."""

import pytest
import torch

from moebench.bench.layer.loads import MARGIN, assign_experts, build_input_for_loads, expert_counts, make_input
from moebench.bench.layer.shapes import GPU_PRESETS, PRESETS, Shape, check_loads, choose_shapes, parse_shape
from moebench.errors import UsageError
from moebench.experts.feed_forward import ffn_flops


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_balanced_is_equal() -> None:
    assert expert_counts("balanced", num_tokens=32, num_experts=4, top_k=2) == [16, 16, 16, 16]


def test_balanced_is_within_one_where_experts_do_not_divide() -> None:
    assert expert_counts("balanced", num_tokens=5, num_experts=3, top_k=1) == [2, 2, 1]


def test_zipf_by_hand() -> None:
    # shares 1, 1/2, 1/3, 1/4 of 25/12: of 25 assignments 12, 6, 4, 3
    assert expert_counts("zipf", num_tokens=25, num_experts=4, top_k=1) == [12, 6, 4, 3]


def test_no_expert_gets_a_token_twice() -> None:
    # 12, 6, 4, 3 of 25 would give the first expert more than the 10 tokens there are; the rest shares 10.
    counts = expert_counts("zipf", num_tokens=10, num_experts=4, top_k=2)
    assert counts[0] <= 10
    assert sum(counts) == 20
    assert expert_counts("zipf", num_tokens=4, num_experts=2, top_k=2) == [4, 4]


@pytest.mark.parametrize("load", ["balanced", "zipf"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(32, 4, 2), (64, 16, 1), (24, 8, 8), (30, 7, 3)])
def test_every_expert_gets_its_count_and_every_token_different_experts(
    load: str, tokens: int, experts: int, top_k: int
) -> None:
    counts = expert_counts(load, tokens, experts, top_k)
    expert_TK = assign_experts(counts, tokens, draw())
    assert expert_TK.shape == (tokens, top_k)
    assert torch.bincount(expert_TK.reshape(-1), minlength=experts).tolist() == counts
    assert all(len(set(row)) == top_k for row in expert_TK.tolist())


@pytest.mark.parametrize("load", ["balanced", "zipf"])
def test_a_gate_chooses_the_wanted_experts_with_a_margin(load: str) -> None:
    gate_ED = 0.1 * torch.randn(16, 32, generator=draw())
    x_TD = make_input(load, gate_ED, 64, 2, draw())
    top = (x_TD @ gate_ED.t()).topk(3, dim=-1)
    loads = torch.bincount(top.indices[:, :2].reshape(-1), minlength=16).tolist()
    assert loads == expert_counts(load, 64, 16, 2)
    assert float((top.values[:, 1] - top.values[:, 2]).min()) > MARGIN - 1e-4


def test_router_load_is_plain_noise() -> None:
    gate_ED = torch.randn(4, 8, generator=draw())
    x_TD = make_input("router", gate_ED, 16, 2, draw())
    assert torch.equal(x_TD, torch.randn(16, 8, generator=draw()))


def test_more_experts_than_dimensions_are_refused() -> None:
    gate_ED = torch.ones(8, 4)  # all experts look the same
    with pytest.raises(UsageError, match=r"--load: cannot be forced on E=8 experts from inputs of d=4"):
        build_input_for_loads(gate_ED, assign_experts([2] * 8, 16, draw()), draw())


def test_presets_are_those_that_are_published() -> None:
    sizes = [(s.num_tokens, s.d_model, s.hidden, s.num_experts, s.top_k) for s in PRESETS[:8]]
    assert sizes[0] == (2048, 512, 1024, 8, 2)
    assert sizes[2] == (2048, 256, 256, 64, 8)
    assert sizes[7] == (64, 256, 512, 16, 2)
    assert len({shape.name for shape in (*PRESETS, *GPU_PRESETS)}) == len(PRESETS) + len(GPU_PRESETS)


def test_parse_a_shape() -> None:
    shape = parse_shape("32, 8,16,4,2,swiglu")
    assert (shape.num_assignments, shape.sizes) == (64, "T32 d8 hidden16 E4 k2 swiglu")
    # three matrices of 8 x 32 for each of 32 tokens, 2 FLOPs per weight
    assert shape.flops == 32 * 3 * 2 * 8 * 32 == 32 * ffn_flops(8, 32, "swiglu")


def test_choice_of_shapes_and_loads() -> None:
    assert choose_shapes((), ()) == PRESETS
    assert choose_shapes((), ("gpu",)) == GPU_PRESETS
    assert [shape.name for shape in choose_shapes(("8,8,8,2,1,gelu",), ("switch",))] == ["8,8,8,2,1,gelu", "switch"]
    assert check_loads(["zipf", "zipf"]) == ("zipf",)
    assert all(isinstance(shape, Shape) for shape in choose_shapes((), ("middle",)))
