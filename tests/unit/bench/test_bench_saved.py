"""Bytes saved for backward, counted by hand."""

import torch

from moebench.bench.layer.problem import make_problem
from moebench.bench.layer.row import compare_outputs
from moebench.bench.layer.saved import count_saved_bytes, min_saved_bytes
from moebench.bench.layer.shapes import parse_shape
from moebench.bench.layer.variants import DENSE, OURS, build_dense_twin, build_variants, route_context
from moebench.bench.step.uniform import UniformLoad


def test_storages_count_once_and_excluded_ones_not() -> None:
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(4, 6, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = x @ weight  # saves x and weight
        return hidden * hidden  # saves hidden, twice

    assert count_saved_bytes(forward, [x, weight]) == 10 * 6 * 4
    assert count_saved_bytes(forward, [weight]) == 10 * 6 * 4 + 10 * 4 * 4


def test_a_view_keeps_its_whole_storage() -> None:
    x = torch.randn(10, 4)
    weight = torch.randn(2, 6, requires_grad=True)
    assert count_saved_bytes(lambda: x[:, :2] @ weight, [weight]) == 10 * 4 * 4


def test_min_saved_bytes() -> None:
    assert min_saved_bytes(64, d_model=8, hidden=16, gated=False, element_size=4) == 64 * 24 * 4
    assert min_saved_bytes(64, d_model=8, hidden=16, gated=True, element_size=2) == 64 * 40 * 2


def test_dense_gelu_saves_hidden_values_before_and_after_the_activation() -> None:
    problem = make_problem(parse_shape("32,8,16,4,2,gelu"), "router", seed=0, device=torch.device("cpu"))
    dense = build_dense_twin(problem)
    assert (dense.name, problem.dense.w_in_DF.shape) == (DENSE, (8, 32))
    excluded = [problem.x_TD, *dense.module.parameters()]
    assert count_saved_bytes(lambda: dense.forward(problem.x_TD), excluded) == 2 * 32 * 32 * 4


def test_our_layer_equals_the_double_loop_and_capacity_counts_its_drops() -> None:
    problem = make_problem(parse_shape("32,8,16,4,2,swiglu"), "zipf", seed=0, device=torch.device("cpu"))
    variants = [one for one in build_variants(problem) if hasattr(one, "forward")]
    differences = compare_outputs(problem, variants)
    assert differences[OURS] is not None
    assert differences[OURS][0] < 1e-6
    # 64 assignments, zipf 31 15 10 8 -> capacity ceil(1.25 · 64 / 4) = 20 keeps 20 15 10 8 = 53
    load_E = problem.layer.router(problem.x_TD, route_context(problem)).load_E
    assert load_E.tolist() == [31, 15, 10, 8]
    assert variants[1].measure_dropped() == 11 / 64


def test_a_forced_even_load_cycles_through_the_experts() -> None:
    problem = make_problem(parse_shape("32,8,16,4,2,swiglu"), "zipf", seed=0, device=torch.device("cpu"))
    ctx = route_context(problem)
    own, forced = problem.layer.router(problem.x_TD, ctx), UniformLoad(problem.layer.router)(problem.x_TD, ctx)
    assert forced.load_E.tolist() == [16, 16, 16, 16]
    assert forced.expert_N[:6].tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(forced.weight_N, own.weight_N)
