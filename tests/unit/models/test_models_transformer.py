import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import randomise_parameters

from moebench.config import resolve
from moebench.experts.feed_forward import FeedForward
from moebench.models.attention import Attention, AttentionStyle
from moebench.models.build import build_backbone
from moebench.models.positions import Rotary, rotate
from moebench.models.transformer import BatchContext, Block, Transformer, init_weights
from moebench.routing.context import DataSummary
from moebench.routing.layer_name import LayerName
from moebench.routing.losses import load_balance
from moebench.schema import CellConfig

CPU = torch.device("cpu")


def config_of(router: str = "switch", **sections) -> CellConfig:
    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 4, "ffn_width": 16}
    layout = {"n": 2, "num_experts": 4, "expert_width": 8}
    return resolve(
        {
            "router": router,
            "model": sizes | sections.pop("model", {}),
            "layout": layout | sections.pop("layout", {}),
            **sections,
        }
    )


def backbone_of(config: CellConfig, *, causal: bool = True, seed: int = 0) -> Transformer:
    backbone = build_backbone(
        config, causal=causal, data=DataSummary(vocab_size=20, token_count_V=torch.arange(20, 0, -1))
    )
    init_weights(backbone, seed)
    return backbone


def batch(*, training: bool = False, seed: int = 0, step: int = 0, size: tuple[int, int] = (2, 6)) -> BatchContext:
    token_id_BL = torch.arange(size[0] * size[1]).view(size) % 20
    return BatchContext(training=training, seed=seed, step=step, token_id_BL=token_id_BL)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.sampled_from([2, 4, 8]))
def test_rotary_attention_depends_on_the_distance_alone(first: int, second: int, shift: int, width: int) -> None:
    generator = torch.Generator().manual_seed(first * 41 + second)
    query, key = torch.randn(2, width, generator=generator, dtype=torch.float64)
    cos, sin = (table.double() for table in Rotary(theta=100.0).table(100, width, CPU))

    def score(at: int, to: int) -> torch.Tensor:
        turned = rotate(query, cos[at], sin[at]), rotate(key, cos[to], sin[to])
        return torch.dot(*turned)

    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), rtol=1e-4, atol=1e-5)


def test_rotation_keeps_lengths_and_leaves_position_0_alone() -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    cos, sin = Rotary().table(5, 4, CPU)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    # The first pair turns by one radian for each position, the second by theta^-1/2 = 0.01.
    assert cos[1].tolist() == pytest.approx([0.5403023, 0.99995], abs=1e-6)


@pytest.mark.parametrize("router", ["dense", "switch", "noisy_top_k", "hash"])
def test_causal_model_sees_no_future(router: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(router)))
    x_BLD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    other_BLD = x_BLD.clone()
    other_BLD[:, 3:] += 1
    for training in (True, False):
        y_BLD, _ = backbone(x_BLD, batch(training=training))
        changed_BLD, _ = backbone(other_BLD, batch(training=training))
        torch.testing.assert_close(changed_BLD[:, :3], y_BLD[:, :3])
        assert not torch.allclose(changed_BLD[:, 3:], y_BLD[:, 3:])


def test_bidirectional_model_sees_the_future() -> None:
    backbone = randomise_parameters(backbone_of(config_of("dense"), causal=False))
    x_BLD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    other_BLD = x_BLD.clone()
    other_BLD[:, 3:] += 1
    assert not torch.allclose(backbone(other_BLD, batch())[0][:, :3], backbone(x_BLD, batch())[0][:, :3])


def test_attention_does_not_mix_sequences() -> None:
    attention = randomise_parameters(Attention(AttentionStyle.of(config_of().model, 1.0), causal=True))
    x_BLD = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(x_BLD)[1:2], attention(x_BLD[1:2]))


@pytest.mark.parametrize(("n", "places"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_n_places_experts_in_the_last_of_n(n: int, places: list[int]) -> None:
    backbone = backbone_of(config_of(layout={"n": n}))
    _, records = backbone(torch.randn(2, 6, 8), batch())
    assert [record.layer for record in records] == [LayerName(place) for place in places]
    assert len(backbone.moe_layers()) == len(places)


def test_dense_model_has_no_record() -> None:
    backbone = backbone_of(config_of("dense"))
    assert backbone(torch.randn(2, 6, 8), batch())[1] == []
    assert all(isinstance(block.feed_forward, FeedForward) for block in backbone.blocks)


def test_experts_differ_from_each_other_and_between_layers() -> None:
    first, second = (layer.bank for layer in backbone_of(config_of()).moe_layers())
    for left in range(4):
        assert not torch.equal(first.w_in_EDF[left], second.w_in_EDF[left])
        for right in range(left):
            assert not torch.equal(first.w_in_EDF[left], first.w_in_EDF[right])


def test_arms_share_the_weights_of_what_they_share() -> None:
    switch, hash_, dense = (backbone_of(config_of(name)).state_dict() for name in ("switch", "hash", "dense"))
    for name, value in switch.items():
        if name in hash_:
            assert torch.equal(value, hash_[name]), name
        if name in dense:
            assert torch.equal(value, dense[name]), name
    assert {name for name in switch if name not in hash_} == {
        f"blocks.{block}.feed_forward.router.gate.weight_ED" for block in (1, 3)
    }


def test_experts_of_two_routers_with_other_sizes_still_share_the_rest() -> None:
    small, large = (backbone_of(config_of(layout={"num_experts": e})).state_dict() for e in (2, 8))
    for name, value in small.items():
        if value.shape == large[name].shape:
            assert torch.equal(value, large[name]), name


def test_initial_scale_of_an_expert_is_that_of_a_dense_network() -> None:
    config = config_of(model={"d_model": 64, "ffn_width": 256, "num_layers": 2}, layout={"expert_width": 256})
    dense, experts = (block.feed_forward for block in backbone_of(config).blocks)
    assert experts.bank.w_in_EDF.std().item() == pytest.approx(dense.w_in_DF.std().item(), rel=0.05)
    assert experts.bank.w_in_EDF.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert experts.bank.w_out_EFD.std().item() == pytest.approx(256**-0.5 / 4**0.5, rel=0.05)


def draws(ctx: BatchContext, layer: int) -> list[float]:
    return torch.rand(4, generator=ctx.route(LayerName(layer), 6, CPU).random).tolist()


def test_router_noise_belongs_to_seed_step_and_layer() -> None:
    base = draws(batch(training=True, step=3), 1)
    assert draws(batch(training=True, step=3), 1) == base
    assert draws(batch(training=True, step=4), 1) != base
    assert draws(batch(training=True, step=3), 2) != base
    assert draws(batch(training=True, step=3, seed=1), 1) != base
    # In evaluation the step does not matter: the same model gives the same numbers at any step.
    assert draws(batch(step=3), 1) == draws(batch(step=9), 1) != base


def test_each_layer_gets_tokens_in_the_order_of_the_batch() -> None:
    valid_BL = torch.tensor([[True, True, False], [True, False, False]])
    ctx = BatchContext(
        training=True,
        seed=0,
        token_id_BL=torch.tensor([[1, 2, 3], [4, 5, 6]]),
        valid_BL=valid_BL,
        domain_B=torch.tensor([7, 8]),
    ).route(LayerName(), 3, CPU)
    assert ctx.token_id_T is not None
    assert ctx.valid_T is not None
    assert ctx.domain_T is not None
    assert ctx.token_id_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert ctx.valid_T.tolist() == [True, True, False, True, False, False]
    assert ctx.domain_T.tolist() == [7, 7, 7, 8, 8, 8]
    assert ctx.sequence_length == 3


# The tables of rotations are cached, and the compiler traces what makes them.
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@pytest.mark.parametrize("factor", [None, 1.0], ids=["dropless", "capacity"])
def test_a_compiled_block_with_its_balance_loss_is_one_graph(factor: float | None) -> None:
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        block = backbone_of(config_of("top_k", layout={"capacity_factor_train": factor})).blocks[1]
        assert isinstance(block, Block)

        def train(x_BLD: torch.Tensor, block: Block = block) -> torch.Tensor:
            y_BLD, [record] = block(x_BLD, batch(training=True))
            return y_BLD.square().sum() + load_balance(record)

        call = torch.compile(train, backend="aot_eager", fullgraph=True) if compiled else train
        x_BLD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = call(x_BLD)
        results.append([loss, *torch.autograd.grad(loss, [x_BLD, *block.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
