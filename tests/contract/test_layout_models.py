"""Layouts beyond a single bank of feed-forward experts, each against a slow reference implementation."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.cases import Tokens, build_context, randomise_parameters, route
from support.layout_models import BATCH, D_MODEL, LENGTH, backbone_of, batch, config_of
from torch import Tensor

from moebench.experts.reference import double_loop
from moebench.models.positions import Rotary, rotate
from moebench.models.transformer import Block
from moebench.routing.composite import GroupedRouter
from moebench.routing.layer_name import LayerName
from moebench.routing.losses import load_balance
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord, Routing

HEAD_WIDTH = D_MODEL // 2


def slow_heads(
    query_LH: Tensor, key_LH: Tensor, value_LH: Tensor, positions: list[int], causal: bool, only: int | None = None
) -> Tensor:
    """Compute softmax attention of one sequence, or of one position, by loops over heads and positions."""
    cos, sin = Rotary().table(LENGTH, HEAD_WIDTH, query_LH.device)
    rows = []
    for place, position in enumerate(positions):
        if only not in (None, place):
            continue
        heads = []
        for head in range(query_LH.shape[1] // HEAD_WIDTH):
            part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
            query = rotate(query_LH[place, part], cos[position], sin[position])
            seen = range(place + 1) if causal else range(len(positions))
            keys = [rotate(key_LH[other, part], cos[positions[other]], sin[positions[other]]) for other in seen]
            weights = torch.stack([torch.dot(query, key) / HEAD_WIDTH**0.5 for key in keys]).softmax(-1)
            heads.append(sum(weight * value_LH[other, part] for weight, other in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def slow_block(block: Block, x_LD: Tensor, positions: list[int], causal: bool) -> Tensor:
    """Run a dense block on the vectors of one sequence, at the given positions."""
    query, key, value = block.attention.qkv(block.attention_norm(x_LD)).chunk(3, dim=-1)
    x_LD = x_LD + block.attention.out(slow_heads(query, key, value, positions, causal))
    return x_LD + block.feed_forward(block.feed_forward_norm(x_LD))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("router", ["switch", "top_k", "hash", "expert_choice"])
def test_whole_model_equals_a_loop_over_sequences_and_experts(router: str, causal: bool) -> None:
    backbone = randomise_parameters(backbone_of(config_of("whole_model", router, match="none"), causal=causal))
    x_BLD, ctx = batch(training=False)
    x_BLD.requires_grad_()
    y_BLD, (record,) = backbone(x_BLD, ctx)
    x_TD = x_BLD.flatten(0, 1)
    rows = list(x_TD)
    pairs = zip(record.kept.token_N.tolist(), record.kept.expert_N.tolist(), record.kept.weight_N, strict=True)
    lives = {(token, expert): weight for token, expert, weight in pairs}
    for sequence, (expert, stack) in itertools.product(range(BATCH), enumerate(backbone.blocks[0].bank.stacks)):
        tokens = [t for t in range(sequence * LENGTH, (sequence + 1) * LENGTH) if (t, expert) in lives]
        if not tokens:
            continue
        h_LD = x_TD[tokens]
        for block in stack:
            h_LD = slow_block(block, h_LD, [token % LENGTH for token in tokens], causal)
        for place, token in enumerate(tokens):
            rows[token] = rows[token] + lives[token, expert] * (h_LD[place] - x_TD[token])
    slow_BLD = backbone.norm(torch.stack(rows)).view_as(x_BLD)
    torch.testing.assert_close(y_BLD, slow_BLD, rtol=1e-3, atol=1e-4)
    leaves = [x_BLD, *backbone.blocks[0].bank.parameters()]
    fast = torch.autograd.grad(y_BLD.sin().sum(), leaves, retain_graph=True)
    slow = torch.autograd.grad(slow_BLD.sin().sum(), leaves, allow_unused=True)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-2, atol=1e-3)


def test_whole_model_with_one_expert_is_the_dense_model() -> None:
    whole_model = backbone_of(config_of("whole_model", "all_experts", num_experts=1, match="none"))
    dense = backbone_of(config_of("whole_model", "dense", num_experts=1))
    state = {name: value for name, value in whole_model.state_dict().items() if "router" not in name}
    dense.load_state_dict({name.replace("blocks.0.layer.bank.stacks.0.", "blocks."): v for name, v in state.items()})
    x_BLD, ctx = batch(training=False)
    torch.testing.assert_close(whole_model(x_BLD, ctx)[0], dense(x_BLD, ctx)[0])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("router", ["switch", "top_k", "expert_choice"])
def test_head_experts_equal_a_loop_over_tokens(router: str, causal: bool) -> None:
    attention = randomise_parameters(backbone_of(config_of("moduleformer", router), causal=causal)).blocks[0].attention
    x_BLD, ctx = batch(training=False)
    y_BLD, record = attention(x_BLD, ctx.route(LayerName(), LENGTH, x_BLD.device))
    slow_TD = torch.zeros(BATCH * LENGTH, D_MODEL)
    pairs = zip(record.kept.token_N.tolist(), record.kept.expert_N.tolist(), record.kept.weight_N, strict=True)
    for token, expert, weight in pairs:
        x_LD = x_BLD[token // LENGTH]
        key_LH, value_LH = attention.key_value(x_LD).chunk(2, dim=-1)
        query_LH = x_LD @ attention.bank.w_query_EDH[expert]
        (read_H,) = slow_heads(query_LH, key_LH, value_LH, list(range(LENGTH)), causal, only=token % LENGTH)
        slow_TD[token] += weight * (read_H @ attention.bank.w_out_EHD[expert])
    torch.testing.assert_close(y_BLD.flatten(0, 1), slow_TD, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ["switch", "top_k", "hash"])
@pytest.mark.parametrize(("keys_values", "maps"), [("shared", 2), ("apart", 3)])
def test_projection_experts_equal_a_loop_over_tokens(router: str, keys_values: str, maps: int) -> None:
    attention = (
        randomise_parameters(backbone_of(config_of("attention", router, keys_values=keys_values))).blocks[0].attention
    )
    x_BLD, ctx = batch(training=False)
    y_BLD, record = attention(x_BLD, ctx.route(LayerName(), LENGTH, x_BLD.device))
    qkv_TO = torch.zeros(BATCH * LENGTH, maps * D_MODEL)
    for token, expert, weight in zip(record.kept.token_N, record.kept.expert_N, record.kept.weight_N, strict=True):
        qkv_TO[token] += weight * attention.layer.bank.expert(x_BLD.flatten(0, 1)[token], int(expert))
    for sequence in range(BATCH):
        query, key, *value = qkv_TO[sequence * LENGTH : (sequence + 1) * LENGTH].chunk(maps, dim=-1)
        value = value[0] if value else key  # shared: what is read is what was compared, but for its rotation
        slow_LD = attention.out(slow_heads(query, key, value, list(range(LENGTH)), causal=True))
        torch.testing.assert_close(y_BLD[sequence], slow_LD, rtol=1e-3, atol=1e-4)


def test_residual_and_shared_networks_match_the_papers() -> None:
    x_TD = Tokens.draw(24).x_TD.repeat(1, 2)
    ctx = batch(training=False, size=1, length=24)[1].route(LayerName(), 24, x_TD.device)
    fine, residual = (
        randomise_parameters(backbone_of(config_of(name, "top_k"))).blocks[0].feed_forward
        for name in ("fine_grained", "residual")
    )
    y_TD, record = fine(x_TD, ctx)
    assert record.routing.load_E.sum() == 24 * 2 * 4
    torch.testing.assert_close(y_TD, double_loop(fine.bank, x_TD, record.kept) + fine.shared(x_TD))
    y_TD, record = residual(x_TD, ctx)
    mix_T2 = (x_TD @ residual.mix.weight_ED.T + residual.mix.bias_E).softmax(-1)
    slow_TD = mix_T2[:, :1] * double_loop(residual.bank, x_TD, record.kept) + mix_T2[:, 1:] * residual.shared(x_TD)
    torch.testing.assert_close(y_TD, slow_TD)


def build_grouped(router: str, *, pick_groups: bool, groups: int = 4, num_experts: int = 8) -> GroupedRouter:
    """Build a grouped router of two experts in each of four groups, with its default options."""
    router_class = ROUTERS.get(router).item
    config = router_class.Config()
    return randomise_parameters(
        GroupedRouter(router_class, config, build_context(num_experts), groups, pick_groups=pick_groups)
    )


def record_of(routing: Routing) -> LayerRecord:
    return LayerRecord(routing=routing, kept=routing)


def assignments(routing: Routing) -> dict[tuple[int, int], float]:
    routing = routing.compact()
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True)
    return {(token, expert): weight for token, expert, weight in pairs}


ROW_WISE = ["switch", "top_k", "all_experts", "gshard", "hash", "noisy_top_k"]


@pytest.mark.parametrize("router", ROW_WISE)
def test_two_levels_equal_a_loop_over_tokens(router: str) -> None:
    two_levels, tokens = build_grouped(router, pick_groups=True), Tokens.draw(20)
    weights = assignments(route(two_levels, tokens, training=False))
    expected = {}
    for token in range(20):
        alone = tokens.take(torch.tensor([token]))
        for (_, group), above in assignments(route(two_levels.outer, alone, training=False)).items():
            inside = assignments(route(two_levels.inner[group], alone, training=False))
            expected |= {(token, 2 * group + expert): above * weight for (_, expert), weight in inside.items()}
    assert weights == pytest.approx(expected, rel=1e-5)
    if router == "top_k":  # the weights of both levels sum to 1, so their products do
        assert sum(weights.values()) == pytest.approx(20)
        assert len(weights) == 20 * 2 * 2


@pytest.mark.parametrize("router", ROW_WISE)
def test_prototypes_equal_a_loop_over_groups(router: str) -> None:
    prototypes, tokens = build_grouped(router, pick_groups=False), Tokens.draw(20)
    routing = route(prototypes, tokens, training=False)
    expected = {}
    for group, inner in enumerate(prototypes.inner):
        inside = assignments(route(inner, tokens, training=False))
        expected |= {(token, 2 * group + expert): weight for (token, expert), weight in inside.items()}
    assert assignments(routing) == pytest.approx(expected)
    assert routing.kept_N is None
    assert routing.top_k is not None
    assert (routing.token_N.view(20, routing.top_k) == torch.arange(20)[:, None]).all()  # a token-major rectangle


def test_one_prototype_group_equals_the_single_router() -> None:
    flat, one = backbone_of(config_of("every_n", "switch")), backbone_of(config_of("prototypes", "switch", groups=1))
    x_BLD, ctx = batch(training=True)
    assert torch.equal(flat(x_BLD, ctx)[0], one(x_BLD, ctx)[0])


def test_scores_of_two_levels_are_joint_probabilities() -> None:
    routing = route(build_grouped("switch", pick_groups=True), Tokens.draw(20), training=False)
    assert routing.scores_TE is not None
    torch.testing.assert_close(routing.scores_TE.sum(-1), torch.ones(20))
    loss = load_balance(record_of(routing))
    share_E, score_E = routing.load_E / 20, routing.scores_TE.mean(0)
    torch.testing.assert_close(loss, 8 * (share_E * score_E).sum())


@pytest.mark.parametrize("pick_groups", [True, False])
@pytest.mark.parametrize("router", ["gshard", "noisy_top_k"])
def test_router_losses_are_averaged_over_groups(router: str, pick_groups: bool) -> None:
    both, tokens = build_grouped(router, pick_groups=pick_groups), Tokens.draw(40)
    routing = route(both, tokens, training=True)
    (name,) = ROUTERS.get(router).facts.own_losses
    each = [inner.losses(record_of(part))[name] for inner, part in zip(both.inner, routing.parts, strict=True)]
    if pick_groups:
        masks = [routing.picked_TG[:, group] for group in range(4)]
        parts = zip(both.inner, routing.parts, masks, strict=True)
        each = [inner.losses(replace(record_of(part), valid_T=mask))[name] for inner, part, mask in parts]
        each.append(both.outer.losses(record_of(routing.outer))[name])
    torch.testing.assert_close(both.losses(record_of(routing))[name], torch.stack(each).mean())


def test_each_router_is_updated_by_its_own_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    both = build_grouped("top_k", pick_groups=True)  # two experts of each group: a group's load is half of theirs
    routing = route(both, Tokens.draw(16), training=True)
    seen, sums = {}, {}
    for name, router in both.named_modules():
        if type(router) is not GroupedRouter and hasattr(router, "after_step"):
            monkeypatch.setattr(router, "statistics", lambda record: {"served": record.routing.counted_N.sum()})

            def after_step(load_E: Tensor, own: dict, name: str = name) -> None:
                seen[name], sums[name] = load_E.tolist(), own

            monkeypatch.setattr(router, "after_step", after_step)
    both.after_step(torch.tensor([3, 3, 1, 1, 0, 0, 5, 5]), both.statistics(record_of(routing)))
    assert seen == {"inner.0": [3, 3], "inner.1": [1, 1], "inner.2": [0, 0], "inner.3": [5, 5], "outer": [3, 1, 0, 5]}
    for group in range(4):
        assert sums[f"inner.{group}"] == {"served": 2 * routing.picked_TG[:, group].sum()}
    assert sums["outer"] == {"served": 16 * 2}
