"""What a model costs: counted by formula, checked against torch's own counter on a real forward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.training_cases import tiny_config, write_text
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experts.feed_forward import ffn_flops
from moebench.experts.widths import MATCH_TOLERANCE, solve_widths
from moebench.models.build import build_backbone
from moebench.models.cost import compute_cost
from moebench.routing.context import DataSummary
from moebench.routing.router import ROUTERS
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, compute_model_cost, prepare_task

ROUTERS_COUNTED = [
    "dense",
    "switch",
    "top_k",
    "all_experts",
    "noisy_top_k",
    "random",
    "hash",
    "soft_moe",
    "smear",
    "lory",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("router", ROUTERS_COUNTED)
def test_flops_are_those_of_a_real_forward(text, tmp_path, router: str, activation: str) -> None:
    config = tiny_config(text, router=router, model={"activation": activation})
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task).double()  # in fp64 every expert is a plain product, which is counted
    batch = task.train_batch(4, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, batch_context(batch, training=True, seed=0))
    assert compute_model_cost(model, 8).flops_per_token == counter.get_total_flops() / (4 * 8)


def test_cost_by_hand() -> None:
    # D = 8, 2 blocks, the second with E = 4 experts of width 6 behind a switch; length 10.
    config = resolve(
        {
            "model": {"d_model": 8, "num_heads": 2, "num_layers": 2, "ffn_width": 16},
            "layout": {"n": 2, "num_experts": 4, "expert_width": 6},
        }
    )
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    cost = compute_cost(build_backbone(config, causal=True), [embedding, head], 10)
    attention, norms, dense = 4 * 64, 2 * 8, 2 * 8 * 16
    expert, gate, outer = 2 * 8 * 6, 4 * 8, 2 * 20 * 8 + 8
    assert cost.total_params == 2 * (attention + norms) + dense + 4 * expert + gate + outer
    assert cost.active_params == cost.total_params - 3 * expert
    scores = 4 * 10 * 8  # queries times keys, and weights times values, over 10 positions
    assert cost.flops_per_token == 2 * (2 * attention + scores) + 2 * dense + 2 * (gate + expert) + 2 * 20 * 8


def test_parameters_are_those_of_the_modules(text, tmp_path) -> None:
    for router in ROUTERS.names():
        config = tiny_config(text, router=router, layout={"num_experts": 8})
        model = build_initialised_model(config, prepare_task(config, tmp_path))
        cost = compute_model_cost(model, 8)
        assert cost.total_params == sum(parameter.numel() for parameter in model.parameters())
        if router in ("dense", "all_experts"):
            assert cost.active_params == cost.total_params


@pytest.mark.parametrize("router", ROUTERS.names())
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_arms_are_matched_by_default(router: str, activation: str) -> None:
    token_count_V = torch.ones(20, dtype=torch.int64)
    # To mix 128 tokens into 128 slots and back costs 3 · 2·128·D: as much as 192 hidden units. The others cost less.
    ffn_width = 512 if router in ("soft_moe", "multi_gate") else 136

    def flops(name: str) -> int:
        config = resolve({"router": name, "model": {"activation": activation, "ffn_width": ffn_width}})
        backbone = build_backbone(
            config,
            causal=True,
            data=DataSummary(vocab_size=20, token_count_V=token_count_V, sequence_length=128, num_domains=2),
        )
        return compute_cost(backbone, [], 128).flops_per_token

    assert flops(router) == pytest.approx(flops("dense"), rel=MATCH_TOLERANCE)


def width_of(ffn_width: int, top_k: int, router: float) -> int:
    """Match a bank of top_k experts of one width and a router that costs as many FLOPs as so many hidden units."""
    widths = solve_widths(
        lambda widths: widths.of(1.0) * top_k + router,
        lambda ffn_width: ffn_width,
        ffn_width,
        step=4,
        what=f"{top_k} experts per token and their router",
        remedy="layout.expert_width",
    )
    return widths.of(1.0)


@given(st.integers(1, 2000), st.integers(1, 16), st.floats(0, 40))
def test_matched_width_keeps_its_promise_or_refuses(ffn_width: int, top_k: int, router: float) -> None:
    nearest = max(round((ffn_width - router) / top_k), 1)
    best = abs(nearest * top_k + router - ffn_width) / ffn_width
    if best > MATCH_TOLERANCE + 1e-9:
        with pytest.raises(UsageError, match=rf"^model\.ffn_width={ffn_width} "):
            width_of(ffn_width, top_k, router)
    elif best < MATCH_TOLERANCE - 1e-9:
        width = width_of(ffn_width, top_k, router)
        assert width >= 1
        assert abs(width * top_k + router - ffn_width) <= (MATCH_TOLERANCE + 1e-9) * ffn_width


@pytest.mark.parametrize(
    ("ffn_width", "top_k", "router", "width"),
    [
        (512, 1, 0.0, 512),
        (512, 2, 0.0, 256),
        (512, 1, 4.0, 508),
        (512, 1, 5.0, 508),  # 507 to the nearest multiple of 4
        (100, 3, 0.0, 33),  # 32 would be 4 % short, 33 is 1 %
    ],
)
def test_matched_width_by_hand(ffn_width: int, top_k: int, router: float, width: int) -> None:
    assert width_of(ffn_width, top_k, router) == width


def test_the_larger_width_that_a_refusal_names_works() -> None:
    with pytest.raises(UsageError, match=r"model\.ffn_width=10 .* 3 experts per token") as caught:
        width_of(10, 3, 0.0)
    named = int(str(caught.value).split("next that can: model.ffn_width=")[1].split(";")[0])
    assert width_of(named, 3, 0.0) >= 1
    assert named == 12  # 4 each; with 11 it would be 3 or 4 for 3.67


def test_ffn_flops_by_hand() -> None:
    assert ffn_flops(8, 16, "gelu") == 2 * (8 * 16 + 16 * 8)
    assert ffn_flops(8, 16, "swiglu") == 2 * (8 * 32 + 16 * 8)
