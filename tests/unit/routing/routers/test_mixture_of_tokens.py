"""Mixture of Tokens: mixing by hand, groups across sequences, and their division among processes."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import D_MODEL, Case, Tokens, route, run
from support.training_cases import tiny_config, write_text
from torch.utils.flop_counter import FlopCounterMode

from moebench.compatibility import check_cell
from moebench.errors import UsageError
from moebench.parallel.mesh import Mesh
from moebench.ranks import SingleRank
from moebench.routing.mixing import SoftRouting
from moebench.routing.router import ROUTERS
from moebench.training.model import build_initialised_model, prepare_task


def groups_of(size: int, num_experts: int = 8, **options: float) -> Case:
    return Case("mixture_of_tokens", num_experts, {"group_size": size, **options})


def test_mixing_by_hand() -> None:
    # Two sequences of two tokens, mixed at each position; each token gets its share of the output.
    case, tokens = groups_of(2, 2), Tokens.draw(4, length=2)
    layer = case.layer()
    y_TD, record = run(layer, tokens, training=True)
    logits_TE = layer.router.gate(tokens.x_TD)
    for position in (0, 1):
        pair = [position, position + 2]
        share_2E = logits_TE[pair].softmax(0)
        output_E = [layer.bank.expert(share_2E[:, e] @ tokens.x_TD[pair], e) for e in (0, 1)]
        expected_2D = share_2E[:, :1] * output_E[0] + share_2E[:, 1:] * output_E[1]
        torch.testing.assert_close(y_TD[pair], expected_2D)
    assert record.kept.load_E.tolist() == [2, 2]  # one slot per position
    torch.testing.assert_close(record.importance_E, torch.tensor([2.0, 2.0]))


@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))
def test_shares_sum_to_1_over_each_group(batch: int, length: int, size: int) -> None:
    tokens = Tokens.draw(batch * length, length=length)
    routing = route(groups_of(size).router(), tokens, training=False)
    assert isinstance(routing, SoftRouting)
    assert torch.equal(routing.to_tokens(routing.to_groups(tokens.x_TD)), tokens.x_TD)
    share_TE = routing.to_tokens(routing.dispatch_BLS)
    sums = torch.zeros(-(-batch // size), length, 8)
    for token in range(batch * length):
        sums[token // length // size, token % length] += share_TE[token]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert routing.experts_per_token_T.tolist() == [8] * batch * length


def test_group_of_one_sums_all_experts() -> None:
    layer, tokens = groups_of(1).layer(), Tokens.draw(12, length=4)
    y_TD, _ = run(layer, tokens, training=False)
    torch.testing.assert_close(y_TD, sum(layer.bank.expert(tokens.x_TD, e) for e in range(8)))


def test_smaller_last_group_is_computed_separately() -> None:
    layer, tokens = groups_of(2).layer(), Tokens.draw(12, length=4)
    y_TD, _ = run(layer, tokens, training=False)
    for part in (torch.arange(8), torch.arange(8, 12)):
        alone_TD, _ = run(layer, tokens.take(part), training=False)
        torch.testing.assert_close(y_TD[part], alone_TD)


def test_output_depends_on_the_same_position_and_group_only() -> None:
    layer, tokens = groups_of(2).layer(), Tokens.draw(16, length=4)
    y_TD, _ = run(layer, tokens, training=False)
    other_TD, _ = run(layer, tokens.with_other(torch.tensor([5]), seed=3), training=False)
    differs = ((other_TD - y_TD).abs().amax(-1) > 1e-6).nonzero().flatten()
    assert differs.tolist() == [1, 5]


def test_padding_is_not_mixed() -> None:
    layer, tokens = groups_of(2).layer(), Tokens.draw(8, length=4)
    valid_T = torch.tensor([True] * 4 + [True, True, False, False])
    y_TD, record = run(layer, dataclasses.replace(tokens, valid_T=valid_T), training=False)
    alone_TD, _ = run(groups_of(1).layer(), tokens, training=False)
    torch.testing.assert_close(y_TD[2:4], alone_TD[2:4])  # the other tokens of their groups are padding
    assert not y_TD[6:].any()
    assert record.num_unserved == 0
    assert record.kept.load_E.tolist() == [4] * 8


def test_low_temperature_selects_one_token_per_group() -> None:
    routing = route(groups_of(4, temperature=1e-4).router(), Tokens.draw(16, length=4), training=False)
    largest_BE = routing.dispatch_BLS.max(1).values
    torch.testing.assert_close(largest_BE, torch.ones_like(largest_BE), atol=1e-3, rtol=0)


def test_flops_match_torch() -> None:
    layer = groups_of(4).layer().double()
    flops = 8 * 2 * 2 * D_MODEL * 8 // 4 + 3 * 2 * 8 * D_MODEL  # 8 rows for 4 tokens; logits, dispatch, combine
    assert layer.flops_per_token() == flops
    with FlopCounterMode(display=False) as counter:
        run(layer, Tokens.draw(32, length=4, dtype=torch.float64), training=True)
    assert counter.get_total_flops() == 32 * flops


@pytest.mark.parametrize(
    ("total", "together", "size", "spans"),
    [
        (8, 1, 3, [(0, 3), (3, 3), (6, 2)]),
        (8, 2, 3, [(0, 4), (4, 2), (6, 2)]),
        (7, 2, 2, [(0, 4), (4, 3)]),  # the last run is shorter
        (3, 4, 2, [(0, 3), (3, 0)]),  # one run, one process without any
    ],
)
def test_groups_are_not_split_between_processes(total: int, together: int, size: int, spans: list) -> None:
    spans_by_rank = [
        Mesh(world=SingleRank(size=size, rank=rank)).split_sequences(total, together) for rank in range(size)
    ]
    assert [(span.start, span.length) for span in spans_by_rank] == spans
    assert all(span.total == total for span in spans_by_rank)


def test_batches_must_consist_of_full_groups(tmp_path) -> None:
    text = write_text(tmp_path)
    router = {"name": "mixture_of_tokens", "group_size": 3}
    message = r"^train\.batch_size=4 does not divide into groups of 3 sequences, .* \(allowed: a multiple of 3,"
    with pytest.raises(UsageError, match=message):
        check_cell(tiny_config(text, router=router))
    with pytest.raises(UsageError, match=r"^train\.batch_size=6 in train\.accumulate=3 parts .* a multiple of 9,"):
        check_cell(tiny_config(text, router=router, train={"batch_size": 6, "accumulate": 3}))
    config = tiny_config(text, router=router, train={"batch_size": 6}, layout={"capacity_factor_train": 1.0})
    check_cell(config)  # causal with any capacity, which does not apply
    assert build_initialised_model(config, prepare_task(config, tmp_path)).sequence_group_size == 3


def test_options_out_of_range_are_refused() -> None:
    router_class = ROUTERS.get("mixture_of_tokens").item
    with pytest.raises(UsageError, match=r"^router\.group_size must be at least 1, got 0"):
        router_class.check(router_class.Config(group_size=0), 8)
    with pytest.raises(UsageError, match=r"^router\.temperature must be greater than 0, got 0\.0"):
        router_class.check(router_class.Config(temperature=0.0), 8)
