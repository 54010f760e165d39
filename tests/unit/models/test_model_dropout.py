"""Dropout: what it draws depends on the seed, the step and the place alone, and it draws the same for any split."""

from dataclasses import replace

import pytest
import torch
from support.cases import randomise_parameters
from support.layout_models import backbone_of, batch, config_of
from support.model_options import DROPOUT
from torch import Tensor

from moebench.models.attention import Attention, AttentionStyle
from moebench.models.dropout import SequenceDropout
from moebench.models.positions import PositionTable, Rotary
from moebench.models.transformer import BatchContext
from moebench.ranks import Span
from moebench.schema import ModelConfig

DROP = SequenceDropout(rate=0.25, purpose=(0, "dropout", 3, "1.attention"))


def test_survivors_are_scaled_and_their_share_is_that_of_the_rate() -> None:
    dropped = DROP.drop(torch.ones(20, 50, 40))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    # 40,000 draws: the standard deviation of the share is 0.0022.
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.009)


def test_draws_belong_to_the_seed_the_step_the_pass_and_the_place() -> None:
    ctx = BatchContext(training=True, seed=0, step=3)
    x_BLD = torch.ones(2, 6, 8)

    def mask(ctx: BatchContext, place: str = "1.attention") -> Tensor:
        dropout = ctx.dropout(0.25, place)
        assert dropout is not None
        return dropout.drop(x_BLD)

    first = mask(ctx)
    assert torch.equal(mask(ctx), first)
    others = [
        mask(replace(ctx, seed=1)),
        mask(replace(ctx, step=4)),
        mask(replace(ctx, micro_batch=1)),
        mask(replace(ctx, repeat=1)),
        mask(ctx, "1.feed_forward"),
    ]
    assert not any(torch.equal(other, first) for other in others)
    assert ctx.dropout(0.0, "1.attention") is None
    assert replace(ctx, training=False).dropout(0.25, "1.attention") is None


@pytest.mark.parametrize(("start", "length"), [(0, 2), (2, 1), (0, 3), (1, 0)])
def test_a_process_drops_what_one_process_would_drop(start: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BLD, weight_BHLM = torch.randn(3, 5, 4, generator=generator), torch.rand(3, 2, 5, 5, generator=generator)
    part = replace(DROP, span=Span(start=start, length=length, total=3))
    of_part = slice(start, start + length)
    assert torch.equal(part.drop(x_BLD[of_part]), DROP.drop(x_BLD)[of_part])
    assert torch.equal(part.drop_weights(weight_BHLM[of_part]), DROP.drop_weights(weight_BHLM)[of_part])


def test_packed_vectors_have_the_draws_of_their_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BLD, weight_BHLM = torch.randn(2, 5, 4, generator=generator), torch.rand(2, 3, 5, 5, generator=generator)
    position_BC = torch.tensor([[0, 2, 3], [1, 4, 0]])
    packed = PositionTable(position_BL=position_BC, valid_BL=torch.ones(2, 3, dtype=torch.bool), length=5)
    row_B1 = torch.arange(2)[:, None]
    assert torch.equal(DROP.drop(x_BLD[row_B1, position_BC], packed), DROP.drop(x_BLD)[row_B1, position_BC])
    dropped, full = DROP.drop_weights(torch.ones(2, 3, 3, 3), packed), DROP.drop_weights(torch.ones_like(weight_BHLM))
    for b in range(2):
        at_C = position_BC[b]
        assert torch.equal(dropped[b], full[b][:, at_C][:, :, at_C])


def test_slots_of_heads_draw_each_on_its_own() -> None:
    weight_BHLM = torch.ones(2, 6, 4, 4)
    three, two = replace(DROP, num_slots=3), replace(DROP, num_slots=2)
    assert torch.equal(three.drop_weights(weight_BHLM)[:, :4], two.drop_weights(weight_BHLM[:, :4]))


def test_attention_drops_weights_after_the_softmax() -> None:
    config = ModelConfig(d_model=8, num_heads=2)
    attention = randomise_parameters(Attention(AttentionStyle.of(config, 1.0), causal=True))
    x_BLD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    query, key, value = (part.view(2, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x_BLD).split(8, dim=-1))
    cos, sin = Rotary().table(5, 4, x_BLD.device)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    score = (turn(query) @ turn(key).transpose(-1, -2) / 2).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    weight = score.softmax(-1)
    expected = attention.out((DROP.drop_weights(weight) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x_BLD, dropout=DROP), expected)
    nothing = replace(DROP, rate=0.0)
    torch.testing.assert_close(attention(x_BLD, dropout=nothing), attention(x_BLD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate_of", DROPOUT)
def test_each_rate_drops_in_training_alone(rate_of: str) -> None:
    plain = backbone_of(config_of("every_n", "dense"))
    dropping = backbone_of(config_of("every_n", "dense", model={rate_of: 0.2}))
    dropping.load_state_dict(plain.state_dict())
    x_BLD, ctx = batch(training=True)
    assert not torch.allclose(dropping(x_BLD, ctx)[0], plain(x_BLD, ctx)[0])
    assert torch.equal(dropping(x_BLD, ctx)[0], dropping(x_BLD, ctx)[0])
    assert torch.equal(dropping(x_BLD, replace(ctx, training=False))[0], plain(x_BLD, ctx)[0])


def test_arms_drop_the_same_at_places_that_they_share() -> None:
    options = {"embedding_dropout": 0.2, "residual_dropout": 0.2}
    dense = backbone_of(config_of("every_n", "dense", model=options))
    experts = backbone_of(config_of("last_n", "top_k", model=options, n=1))
    x_BLD, ctx = batch(training=True)
    first = [backbone.blocks[0](x_BLD, ctx)[0] for backbone in (dense, experts)]
    assert torch.equal(*first)
