"""Attention with fewer heads of keys and values, normed queries and keys, biases, and scaled positions."""

import math
from typing import Any

import pytest
import torch
from support.cases import randomise_parameters
from support.layout_models import backbone_of, batch, config_of
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.models.attention import Attention, AttentionStyle, CrossAttention, EncoderOutput
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.models.norms import NormStyle, QueryKeyNorm
from moebench.models.positions import Rotary
from moebench.schema import ModelConfig

CPU = torch.device("cpu")
X_BLD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def attention_of(**options: Any) -> Attention:
    config = ModelConfig(d_model=16, num_heads=4, **options)
    attention: Attention = randomise_parameters(Attention(AttentionStyle.of(config, 1.0), causal=True))
    return attention


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_are_attention_with_repeated_keys_and_values(num_kv_heads: int) -> None:
    grouped, full = attention_of(num_kv_heads=num_kv_heads, attention_bias="all"), attention_of(attention_bias="all")
    head_of = [num_kv_heads * head // 4 for head in range(4)]  # of two, heads 0 and 1 have the first

    def repeat(rows: Tensor) -> Tensor:
        return torch.cat([rows[4 * head : 4 * head + 4] for head in head_of])

    with torch.no_grad():
        sizes = [16, 4 * num_kv_heads, 4 * num_kv_heads]
        for name in ("weight", "bias"):
            query, key, value = getattr(grouped.qkv, name).split(sizes)
            getattr(full.qkv, name).copy_(torch.cat([query, repeat(key), repeat(value)]))
            getattr(full.out, name).copy_(getattr(grouped.out, name))
    torch.testing.assert_close(grouped(X_BLD), full(X_BLD))


def test_cross_attention_is_that_of_torch() -> None:
    config = ModelConfig(d_model=16, num_heads=4, attention_bias="all")
    ours = randomise_parameters(CrossAttention(AttentionStyle.of(config, 1.0)))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    memory_BMD, valid_BM = X_BLD.flip(0, 1), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected, _ = theirs(X_BLD, memory_BMD, memory_BMD, key_padding_mask=~valid_BM)
    torch.testing.assert_close(ours(X_BLD, EncoderOutput(x_BMD=memory_BMD, valid_BM=valid_BM)), expected)


@pytest.mark.parametrize(("kind", "width"), [("head", 4), ("full", 16)])
def test_queries_and_keys_are_normed_over_a_head_or_over_all(kind: str, width: int) -> None:
    attention = attention_of(qk_norm=kind, num_kv_heads=2)
    assert attention.qk_norm is not None
    assert (attention.qk_norm.query_width, attention.qk_norm.key_width) == (width, width if width == 4 else 8)
    norm = QueryKeyNorm(NormStyle(eps=0.0), width, 4)
    query, key = norm(X_BLD, X_BLD[..., :8])
    by_part = X_BLD.unflatten(-1, (-1, width))
    expected = (by_part / by_part.square().mean(-1, keepdim=True).sqrt()).flatten(-2)
    torch.testing.assert_close(query, expected)
    assert key.square().unflatten(-1, (2, 4)).mean(-1).flatten().tolist() == pytest.approx([1.0] * 24)


def test_llama_3_scaling_by_hand() -> None:
    # theta = 10^4 over 4 pairs: 1, 0.1, 0.01, 0.001 rad. In 2000 positions they turn 318, 31.8, 3.18 and 0.318 times:
    # above 4 they are kept, below 1 divided by 8, and 3.18 is (3.183 - 1) / 3 = 0.7277 of the way from 1 to 4.
    rotary = Rotary(scaling="llama3", factor=8.0, original_length=2000)
    share = (2000 * 0.01 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1, share * 0.01 + (1 - share) * 0.01 / 8, 0.001 / 8]
    assert rotary.frequencies(8, CPU).tolist() == pytest.approx(expected)
    assert share == pytest.approx(0.7277, abs=1e-4)


def test_linear_and_ntk_scaling_by_hand() -> None:
    assert Rotary(scaling="linear", factor=4.0).frequencies(4, CPU).tolist() == pytest.approx([0.25, 0.0025])
    # The fastest angle is kept, the slowest divided by the factor.
    assert Rotary(scaling="ntk", factor=4.0).frequencies(4, CPU).tolist() == pytest.approx([1.0, 0.0025])
    assert Rotary(scaling="ntk", factor=4.0).frequencies(2, CPU).tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads must be a divisor of num_heads=4, or null, got 3"),
        ({"num_kv_heads": 8}, "model.num_kv_heads must be a divisor of num_heads=4, or null, got 8"),
        ({"rope_factor": 2.0}, "model.rope_factor must be 1 with model.rope_scaling=none, got 2.0"),
        ({"rope_factor": 0.5}, "model.rope_factor must be at least 1 and finite, got 0.5"),
        ({"rope_scaling": "llama3"}, "model.rope_original_length must be a length with llama3, got None"),
        (
            {"rope_scaling": "ntk", "rope_original_length": 8},
            "model.rope_original_length must be null with rope_scaling=ntk, got 8",
        ),
        (
            {"rope_low_frequency": 4.0},
            "model.rope_high_frequency must be greater than model.rope_low_frequency=4, got 4.0",
        ),
        ({"residual_dropout": 1.0}, "model.residual_dropout must be at least 0 and below 1, got 1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps must be greater than 0 and finite, or null, got 0.0"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        ModelConfig(num_heads=4, **options)
    assert str(refusal.value) == message


def test_projections_of_experts_have_the_widths_of_dense_attention() -> None:
    for keys_values, width in (("shared", 16 + 8), ("apart", 16 + 2 * 8)):
        options = {"num_heads": 4, "num_kv_heads": 2, "attention_bias": "qkv"}
        config = config_of("attention", model=options, keys_values=keys_values, match="none")
        attention = backbone_of(config).blocks[0].attention
        assert isinstance(attention, ProjectionExperts)
        assert attention.layer.bank.weight_EDO.shape == (8, 16, width)
        assert attention.layer.bank.b_out_EO.shape == (8, width)
        assert attention.out.bias is None


@pytest.mark.parametrize("keys_values", ["apart", "shared"])
def test_equal_experts_in_attention_are_dense_attention(keys_values: str) -> None:
    options = {"num_heads": 4, "num_kv_heads": 2, "attention_bias": "all", "qk_norm": "head"}
    config = config_of("attention", model=options, keys_values=keys_values, match="none")
    backbone = randomise_parameters(backbone_of(config))
    attention, bank = backbone.blocks[0].attention, backbone.blocks[0].attention.layer.bank
    dense = attention_of(num_kv_heads=2, attention_bias="all", qk_norm="head")
    with torch.no_grad():
        for stack, one in ((bank.weight_EDO, dense.qkv.weight), (bank.b_out_EO, dense.qkv.bias)):
            stack.copy_(stack[:1].expand_as(stack))
            complete = torch.cat([stack[0], stack[0][..., 16:]], -1) if keys_values == "shared" else stack[0]
            one.copy_(complete.T if complete.dim() == 2 else complete)
    dense.out, dense.qk_norm = attention.out, attention.qk_norm
    _, ctx = batch(training=False, length=6)
    y_BLD, _ = attention(X_BLD, ctx.route_in(attention.layer, X_BLD))  # two equal experts with weights of sum 1
    torch.testing.assert_close(y_BLD, dense(X_BLD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_kv_heads", "shared"), [(None, 2), (2, 1), (1, 1)])
def test_experts_that_are_heads_share_fewer_keys_and_values(num_kv_heads: int | None, shared: int) -> None:
    # 4 heads at 2 experts per token: an expert has 2. With 2 query heads for each key there is one.
    options = {"num_heads": 4, "num_kv_heads": num_kv_heads, "attention_bias": "all", "qk_norm": "head"}
    backbone = randomise_parameters(backbone_of(config_of("moduleformer", model=options, match="none")))
    attention = backbone.blocks[0].attention
    assert isinstance(attention, HeadExperts)
    assert (attention.heads_per_expert, attention.kv_heads) == (2, shared)
    _, ctx = batch(training=False, length=6)
    ctx_T = ctx.route_in(attention.layer, X_BLD)
    y_BLD, record = attention(X_BLD, ctx_T)
    torch.testing.assert_close(y_BLD.flatten(0, 1), heads_by_hand(attention, X_BLD, record), rtol=1e-3, atol=1e-4)


def heads_by_hand(attention: HeadExperts, x_BLD: Tensor, record: Any) -> Tensor:
    """Compute experts that are heads one assignment and one head at a time, with dense attention over all tokens."""
    bank, length, width = attention.bank, x_BLD.shape[1], attention.style.head_width
    cos, sin = Rotary().table(length, width, CPU)
    x_TD, out = x_BLD.flatten(0, 1), torch.zeros(x_BLD.numel() // 16, 16)

    def turn(x: Tensor, at: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos[at] - second * sin[at], second * cos[at] + first * sin[at]], -1)

    key_TX, value_TX = attention.key_value(x_TD).chunk(2, -1)
    for token, expert, weight in zip(
        record.kept.token_N.tolist(), record.kept.expert_N.tolist(), record.kept.weight_N, strict=True
    ):
        start, at = token // length * length, token % length
        query_H = x_TD[token] @ bank.w_query_EDH[expert] + bank.b_query_EH[expert]
        mixed = []
        for head in range(attention.heads_per_expert):
            kv = slice(width * (head * attention.kv_heads // attention.heads_per_expert), None)
            kv = slice(kv.start, kv.start + width)
            query = attention.qk_norm.query(query_H[width * head : width * (head + 1)])
            key_LW = attention.qk_norm.key(key_TX[start : token + 1, kv])
            score_L = turn(key_LW, torch.arange(at + 1)) @ turn(query, torch.tensor(at)) * width**-0.5
            mixed.append(score_L.softmax(0) @ value_TX[start : token + 1, kv])
        out[token] += weight * (torch.cat(mixed) @ bank.w_out_EHD[expert] + bank.b_out_ED[expert])
    return out
