"""Ten common mistakes of MoE implementations, each excluded by a minimal test.

The full matrices are in the tests of losses, capacity, causality and processes.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import Case, Tokens, route, run
from support.mesh_cases import case as tiny_cell
from support.process_group import ALONE, Shape
from support.training_cases import tiny_config, write_text
from support.training_steps import TOLERANCE, assert_same_training, close, train_steps, trained_alike
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebench.experts.capacity import Capacity
from moebench.experts.layer import MoELayer
from moebench.routing.losses import load_balance
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord, Routing
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.objective import compute_objective

HALVES = (torch.arange(0, 32), torch.arange(32, 64))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def trained(text: Path, tmp_path: Path) -> Callable[..., dict]:
    """Return a function that trains a tiny cell for three steps on a mesh and checks that all ranks agree."""

    def train(shape: Shape, **overrides: object) -> dict:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return trained_alike(shape.run(train_steps, text, shape.over(tiny_cell(**overrides)), folder))

    return train


def even_record(num_experts: int, top_k: int) -> LayerRecord:
    """Return a record with even loads and uniform scores."""
    expert_TK = (torch.arange(num_experts).unsqueeze(1) + torch.arange(top_k)) % num_experts
    scores_TE = torch.full((num_experts, num_experts), 1 / num_experts)
    routing = Routing.from_top_k(
        expert_TK, torch.full((num_experts, top_k), 1 / top_k), num_experts=num_experts, scores_TE=scores_TE
    )
    return LayerRecord(routing=routing, kept=routing)


def collapsed_record(expert: int) -> LayerRecord:
    """Return the record of 6 tokens that all choose one of 3 experts with certainty."""
    scores_TE = torch.nn.functional.one_hot(torch.full((6,), expert), 3).float()
    routing = Routing.from_top_k(torch.full((6, 1), expert), torch.ones(6, 1), num_experts=3, scores_TE=scores_TE)
    return LayerRecord(routing=routing, kept=routing)


def router_gradient(text: Path, folder: Path, coefficient: float) -> tuple[Tensor, float, float]:
    """Return the first router's gradient, the logged task loss, and the minimised loss."""
    config = tiny_config(text, router={"name": "switch", "losses": {"load_balance": coefficient}})
    task = prepare_task(config, folder)
    model = build_initialised_model(config, task)
    with torch.no_grad():  # a zero head passes no gradient
        model.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    batch = task.train_batch(4, 0, 0)
    output, records = model(batch, batch_context(batch, training=True, seed=0))
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    objective = compute_objective(task.loss(output, batch), batch, layers, records, config.router.losses)
    objective.total.backward()
    gradient = layers[0].router.gate.weight_ED.grad
    assert gradient is not None
    return gradient, objective.task.item(), objective.total.item()


def test_pitfall_01_scale_of_a_loss_depends_on_k_layers_or_micro_batches(trained: Callable[..., dict]) -> None:
    for num_experts, top_k in ((4, 1), (4, 2), (8, 1), (8, 3), (8, 8)):
        assert load_balance(even_record(num_experts, top_k)).item() == pytest.approx(1.0)
    # One batch of 8, or 2 micro-batches of 4: the same gradients, with a loss that is a mean over tokens.
    router = {"losses": {"load_balance": 0.0, "importance": 0.0, "z": 0.1}}
    full, accumulated = trained(ALONE, router=router), trained(ALONE, router=router, train={"accumulate": 2})
    for ours, theirs in zip(accumulated["steps"], full["steps"], strict=True):
        for name, gradient in theirs["grads"].items():
            close(ours["grads"][name], gradient, TOLERANCE, name)


def test_pitfall_02_the_balance_loss_never_reaches_the_router(text: Path, tmp_path: Path) -> None:
    without_loss, task, total = router_gradient(text, tmp_path, 0.0)
    with_loss, same_task, larger_total = router_gradient(text, tmp_path, 1.0)
    assert (with_loss - without_loss).norm() > 1e-3 * without_loss.norm()
    assert task == same_task == total  # the logged task loss contains no other loss
    assert larger_total > 1 > larger_total - task - 1  # the minimised loss does


def test_pitfall_03_balance_is_measured_over_the_wrong_pool() -> None:
    # Three layers, each collapsed on another expert: pooled they would be even. Each has E / k = 3.
    values = [load_balance(collapsed_record(expert)).item() for expert in range(3)]
    assert values == pytest.approx([3.0, 3.0, 3.0])
    # Loads count before capacity: dropped assignments are included.
    record = collapsed_record(0)
    dropped = replace(record, kept=record.routing.keep(torch.arange(6) < 2))
    assert load_balance(dropped).item() == pytest.approx(3.0)


@pytest.mark.slow  # `test_same_training` has the same on both axes of a mesh
def test_pitfall_04_gradients_of_experts_are_wrong_in_parallel(trained: Callable[..., dict]) -> None:
    # Each gradient, the router's too, and the clip norm, in every step, with a balance loss over all tokens.
    assert_same_training(trained(Shape(1, 2)), trained(ALONE))


def test_pitfall_05_evaluation_is_not_deterministic_or_depends_on_the_batch() -> None:
    for name in ("switch", "top_k", "gshard", "noisy_top_k", "base", "sparse_mixer"):
        layer, tokens = Case(name).layer(), Tokens.draw(64, length=16)
        full_TD, _ = run(layer, tokens, training=False, seed=0)
        again_TD, _ = run(layer, tokens, training=False, seed=1)
        assert torch.equal(full_TD, again_TD), name
        halves = [run(layer, tokens.take(half_T), training=False)[0] for half_T in HALVES]
        torch.testing.assert_close(torch.cat(halves), full_TD)
    assert ROUTERS.get("expert_choice").facts.causality.batch_dependent


def test_pitfall_06_edge_cases_of_capacity_change_the_algorithm() -> None:
    # 64 tokens of k=1 for 8 experts: ceil(64 · f / 8) slots; a factor of 0 gives no slots, not dropless.
    for factor, slots in ((None, 64), (0.0, 0), (1e-3, 1), (1.0, 8), (math.inf, 64)):
        layer = Case("switch", options={"jitter": 0.0}).layer(capacity=Capacity(train=factor))
        _, record = run(layer, Tokens.draw(64), training=True)
        load_E, kept_E = record.routing.load_E, record.kept.load_E
        assert torch.equal(kept_E, load_E.clamp(max=slots)), factor
        assert record.num_dropped == int((load_E - kept_E).sum())
    # Ties: equal tokens prefer one expert, and the earlier ones keep its slots.
    same = replace(Tokens.draw(16), x_TD=torch.ones(16, 8))
    for order in ("position", "score"):
        layer = Case("switch").layer(capacity=Capacity(eval=2.0, drop_order=order))
        _, record = run(layer, same, training=False)
        assert record.kept.counted_N.tolist() == [True] * 4 + [False] * 12


def test_pitfall_07_later_tokens_leak_into_earlier_ones() -> None:
    past_T, future_T = torch.arange(8), torch.arange(8, 16)
    for name, causal in (("switch", True), ("base", False), ("expert_choice", False), ("soft_moe", False)):
        layer = Case(name).layer()
        changed = False
        for seed in range(4):
            tokens = Tokens.draw(16, seed=seed)
            y_TD, _ = run(layer, tokens, training=True)
            other_TD, _ = run(layer, tokens.with_other(future_T, seed=100 + seed), training=True)
            changed |= bool((y_TD[past_T] - other_TD[past_T]).abs().max() > 1e-4)
        assert changed is not causal, name
        assert ROUTERS.get(name).facts.causality.causal is causal


@pytest.mark.parametrize(
    "case",
    [
        *(Case(name) for name in ("switch", "base", "sinkhorn", "gumbel", "speech_moe")),
        Case("top_k", options={"top_k": 1, "renormalise": False}),
        Case("loss_free", options={"top_k": 1}),
        Case("v_moe", options={"top_k": 1}),
        Case("sigma_moe", options={"top_k": 1}),
    ],
    ids=str,
)
def test_pitfall_08_the_router_of_one_expert_gets_no_gradient_from_the_task(case: Case) -> None:
    layer = case.layer()
    y_TD, _ = run(layer, Tokens.draw(64), training=True)
    (y_TD * torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert case.experts_per_token == 1
    assert all(parameter.grad.norm() > 1e-4 for parameter in layer.router.parameters())


def test_pitfall_09_state_counts_twice_or_drifts() -> None:
    biases = []
    for recompute in (False, True):
        layer, tokens = Case("loss_free").layer(), Tokens.draw(64)
        records = []

        def forward(x_TD: Tensor, layer=layer, tokens=tokens, records=records) -> Tensor:
            y_TD, record = layer(x_TD, tokens.context(training=True))
            records.append(record)
            return y_TD

        before = {name: value.clone() for name, value in layer.router.state_dict().items()}
        x_TD = tokens.x_TD.requires_grad_()
        y_TD = checkpoint(forward, x_TD, use_reentrant=False) if recompute else forward(x_TD)
        y_TD.sum().backward()
        route(layer.router, tokens, training=False)
        assert all(torch.equal(value, before[name]) for name, value in layer.router.state_dict().items())
        layer.after_step(records[:1])
        biases.append(layer.router.bias_E.clone())
    assert biases[0].dtype == torch.float32
    assert biases[0].any()
    assert torch.equal(*biases)
    # Four micro-batches are the batch: one update, from the sum of their counts.
    layer = Case("loss_free").layer()
    parts = [run(layer, Tokens.draw(64).take(torch.arange(16 * i, 16 * i + 16)), training=True)[1] for i in range(4)]
    layer.after_step(parts)
    assert torch.equal(layer.router.bias_E, biases[0])


@pytest.mark.slow
def test_pitfall_10_uneven_ranks_hang_or_diverge(trained: Callable[..., dict]) -> None:
    # One sequence for two processes: one has no tokens and sends nothing to the other's experts. Collective calls time
    # out after 30 s.
    few = {"train": {"batch_size": 1}}
    assert_same_training(trained(Shape(1, 2), **few), trained(ALONE, **few))


def test_pitfall_10_idle_experts_have_gradients_too() -> None:
    layer = Case("switch").layer()
    y_TD, record = run(layer, Tokens.draw(0), training=True)
    y_TD.sum().backward()
    assert record.routing.load_E.sum() == 0
    assert all(parameter.grad is not None for parameter in layer.bank.parameters())  # equal weight decay on all ranks
