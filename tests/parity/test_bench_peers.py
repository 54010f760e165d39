"""Other libraries' layers with our weights give our output and our gradients: the benchmark compares equal work."""

from types import ModuleType
from typing import Any

import pytest
import torch

from moebench.bench.layer.peers.register import PACKAGE, PEERS, find_absence_reason
from moebench.bench.layer.problem import Candidate, Problem, Skipped, make_problem
from moebench.bench.layer.row import compare_outputs
from moebench.bench.layer.shapes import parse_shape
from moebench.bench.layer.variants import CAPACITY, build_variants, route_context

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def problem_of(shape: str, load: str = "zipf") -> Problem:
    return make_problem(parse_shape(shape), load, seed=0, device=torch.device("cpu"))


def adapter(package: str) -> Any:
    peer = next(peer for peer in PEERS if peer.package == package)
    pytest.importorskip(peer.module)
    assert find_absence_reason(peer) is None
    import importlib

    module: ModuleType = importlib.import_module(f"{PACKAGE}.{peer.adapter}")
    return module


def layers(package: str, problem: Problem) -> dict[str, Candidate]:
    candidates = adapter(package).build_candidates(problem)
    return {one.name: one for one in candidates if isinstance(one, Candidate)}


def own(problem: Problem) -> list[Candidate]:
    return [one for one in build_variants(problem) if isinstance(one, Candidate)]


BLOCKS = ("Mixtral", "Qwen3-MoE", "OLMoE")


@pytest.mark.parametrize(("shape", "names"), [("32,8,16,4,2,swiglu", BLOCKS[:2]), ("16,64,8,64,8,swiglu", BLOCKS)])
def test_transformers_blocks_agree(shape: str, names: tuple[str, ...]) -> None:
    problem = problem_of(shape)
    candidates = layers("transformers", problem)
    assert set(candidates) == {f"{name} {how}" for name in names for how in ("eager", "grouped_mm", "batched_mm")}
    differences = compare_outputs(problem, [*own(problem), *candidates.values()])
    for name in candidates:
        assert differences[name] is not None
        assert differences[name][0] <= 1e-5, name


def test_a_transformers_block_has_our_gradients() -> None:
    problem = problem_of("32,8,16,4,2,swiglu")
    block: Any = layers("transformers", problem)["Mixtral eager"]
    dy_TD = torch.randn_like(problem.x_TD)
    block.forward(problem.x_TD).backward(dy_TD)
    y_TD, _ = problem.layer(problem.x_TD, route_context(problem))
    y_TD.backward(dy_TD)
    gate = problem.layer.router.gate.weight_ED
    torch.testing.assert_close(block.module.gate.weight.grad, gate.grad, rtol=1e-3, atol=1e-5)
    w_in = problem.bank.w_in_EDF.grad
    assert w_in is not None
    torch.testing.assert_close(block.module.experts.gate_up_proj.grad.transpose(1, 2), w_in, rtol=1e-3, atol=1e-5)


def test_transformers_switch_drops_what_our_capacity_drops() -> None:
    problem = problem_of("32,8,16,4,1,gelu")
    (switch,) = layers("transformers", problem).values()
    ours = next(one for one in own(problem) if one.name == CAPACITY)
    assert switch.measure_dropped() == pytest.approx(ours.measure_dropped())
    assert ours.measure_dropped() > 0
    differences = compare_outputs(problem, [*own(problem), switch])
    assert differences[switch.name] is not None
    assert differences[switch.name][0] <= 1e-5


def test_batched_mm_is_refused_where_it_copies_too_much() -> None:
    candidates = adapter("transformers").build_candidates(problem_of("512,8,8,4,2,swiglu", "balanced"))
    skipped = [one for one in candidates if isinstance(one, Skipped)]
    assert [one.name for one in skipped] == ["Mixtral batched_mm", "Qwen3-MoE batched_mm"]


def test_mixture_of_experts_agrees_when_it_drops_nothing() -> None:
    mixture = adapter("mixture-of-experts")
    problem = problem_of("32,8,16,4,2,gelu", "balanced")
    forward = mixture.forward_of(problem, mixture.build(problem, capacity_factor=4.0))
    expected, _ = problem.layer(problem.x_TD, route_context(problem))
    torch.testing.assert_close(forward(problem.x_TD), expected, rtol=1e-4, atol=1e-5)


def test_mixture_of_experts_reports_its_drops() -> None:
    problem = problem_of("32,8,16,4,2,gelu")
    (moe,) = layers("mixture-of-experts", problem).values()
    assert moe.measure_dropped() == 11 / 64  # loads 31 15 10 8 over 20 slots, as ours


def test_st_moe_drops_what_our_capacity_drops() -> None:
    problem = problem_of("32,8,16,4,2,swiglu")
    (moe,) = layers("st-moe-pytorch", problem).values()
    assert moe.measure_dropped() == 11 / 64
    assert moe.forward(problem.x_TD).shape == problem.x_TD.shape


def test_soft_moe_has_as_many_slots_as_the_row_has_assignments() -> None:
    problem = problem_of("32,8,16,4,1,gelu")
    (moe,) = layers("soft-moe-pytorch", problem).values()
    module: Any = moe.module
    assert module.slot_embeds.shape == (4, 8, 8)
    assert module.experts.experts[0][0].out_features == 16
    assert moe.forward(problem.x_TD).shape == problem.x_TD.shape
