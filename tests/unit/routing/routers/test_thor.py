"""THOR: what is drawn for whom, and two passes over a batch that must agree: what is trained and what it costs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run
from support.training_cases import tiny_config, write_text
from torch import Tensor

from moebench.ranks import Span
from moebench.routing.composite import GroupedRouter
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.training.batches import build_loss_normalizer
from moebench.training.evaluation import batch_context
from moebench.training.model import initialised_model, model_cost, prepare_task
from moebench.training.module import CellModule
from moebench.training.objective import divergence

SIGMAS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def module_of(text: Path, folder: Path, router: dict[str, Any], **overrides: Any) -> CellModule:
    config = tiny_config(text, router={"name": "thor", **router}, **overrides)
    task = prepare_task(config, folder)
    module = CellModule(config, initialised_model(config, task), task)
    with torch.no_grad():  # the head starts at zero, where all passes agree
        module.model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return module


def judged_batch(module: CellModule, valid_BL: Tensor | None = None) -> tuple[Any, list[Any], list[Tensor]]:
    """Return what the first batch gives: the objective, the records of the passes, and their outputs."""
    count_BP = None if valid_BL is None else valid_BL.long()
    batch = replace(module.task.train_batch(4, 0, 0), valid_BL=valid_BL, count_BP=count_BP)
    outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
    found, records = module.compute_loss(batch, outputs, records)
    return found, records, outputs


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    # ½ (¼ ln 2 - ¼ ln ⅔) = ⅛ ln 3
    assert divergence(p, q).item() == pytest.approx(math.log(3) / 8)


@given(st.integers(2, 6), st.integers(0, 99))
def test_divergence_is_symmetric_and_no_less_than_0(num_classes: int, seed: int) -> None:
    first, second = 3 * torch.randn(2, 5, num_classes, generator=torch.Generator().manual_seed(seed))
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    assert (divergence(p, q) > 0).all()
    assert torch.equal(divergence(p, q), divergence(q, p))
    assert not divergence(p, p).any()


def test_passes_that_draw_the_same_experts_agree(text: Path, tmp_path: Path) -> None:
    one = {"layout": {"num_experts": 1}}  # there is nothing else to draw
    assert judged_batch(module_of(text, tmp_path, {}, **one))[0].raw["consistency"] == 0
    found, records, _ = judged_batch(module_of(text, tmp_path, {}))
    drawn = [[record.routing.expert_N.unique().tolist() for record in of_pass] for of_pass in records]
    assert drawn[0] != drawn[1]
    assert found.raw["consistency"] > 1e-4


def test_task_loss_is_the_mean_of_the_passes_and_padding_counts_nowhere(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {"consistency": 3.0})
    valid_BL = torch.arange(8).expand(4, 8) < torch.tensor([[8], [5], [1], [0]])
    found, _, outputs = judged_batch(module, valid_BL)
    batch = module.task.train_batch(4, 0, 0)
    losses = [module.task.loss(output, batch)[valid_BL].mean() for output in outputs]
    torch.testing.assert_close(found.task, (losses[0] + losses[1]) / 2)
    assert losses[0] != losses[1]
    first, second = (output.log_softmax(-1)[valid_BL] for output in outputs)
    kl = [(a.exp() * (a - b)).sum(-1).mean() for a, b in ((first, second), (second, first))]
    torch.testing.assert_close(found.raw["consistency"], (kl[0] + kl[1]) / 2)
    torch.testing.assert_close(found.total, found.task + 3 * found.raw["consistency"])
    assert set(found.parts()) == {"loss/task", "loss/total", "loss/consistency", "balance/consistency"}


def test_without_a_coefficient_there_is_one_pass(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {"consistency": 0.0})
    found, records, outputs = judged_batch(module)
    assert len(outputs) == len(records) == 1
    assert set(found.parts()) == {"loss/task", "loss/total"}


def test_both_passes_are_on_record(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {}, train={"accumulate": 2})
    for index in range(2):
        module.training_step(module.task.train_batch(4, 0, 0, slice(2 * index, 2 * index + 2)), index)
    assert len(module.records) == 4
    assert len(module.objectives) == 2
    assert sum(int(records[0].routing.load_E.sum()) for records in module.records) == 2 * 4 * 8
    assert all(record.token_loss_T.shape == (16,) for records in module.records for record in records)


def test_division_into_micro_batches_changes_no_gradient(text: Path, tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, 2):
        module = module_of(text, tmp_path, {"consistency": 2.0}, train={"accumulate": accumulate})
        total = torch.zeros(())
        for index in range(accumulate):
            size = 4 // accumulate
            batch = module.task.train_batch(4, 0, 0, slice(size * index, size * index + size))
            ctx = batch_context(batch, training=True, seed=0)  # the same experts for every micro-batch
            found, _ = module.compute_loss(
                batch, *module.run_passes(batch, ctx), build_loss_normalizer(batch, module.config, module.mesh)
            )
            total = total + found.total / accumulate
        gradients.append(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))
    for whole, parts in zip(*gradients, strict=True):
        assert (whole is None) is (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_second_pass_counts(text: Path, tmp_path: Path) -> None:
    costs = [model_cost(module_of(text, tmp_path, {"consistency": consistency}).model, 8) for consistency in (0.0, 0.5)]
    assert [cost.train_passes for cost in costs] == [1, 2]
    assert costs[1].training_flops == 2 * costs[0].training_flops == 2 * costs[0].flops_per_token


def test_groups_ask_for_what_their_routers_ask_for() -> None:
    router_class = ROUTERS.get("thor").item
    both = GroupedRouter(router_class, router_class.Config(consistency=0.7), RouterBuildContext(d_model=8, num_experts=8), 4,
                         pick_groups=True)  # fmt: skip
    assert both.consistency == 0.7


def thor(tokens: Tokens, options: dict[str, Any], *, training: bool, seed: int = 0) -> Tensor:
    """Return the one expert of each token, a row for each sequence."""
    routing = route(Case("thor", 4, options).router(), tokens, training=training, seed=seed)
    assert routing.weight_N.tolist() == [1.0] * len(tokens.x_TD)
    return routing.expert_N.view(-1, tokens.length)


def test_thor_draws_for_a_batch_a_sequence_or_a_token() -> None:
    tokens = Tokens.draw(256, length=8)
    whole = [thor(tokens, {}, training=True, seed=seed) for seed in range(400)]
    assert all(found.unique().numel() == 1 for found in whole)
    load_E = torch.stack([found[0, 0] for found in whole]).bincount(minlength=4)
    assert (load_E - 100).abs().max() < SIGMAS * math.sqrt(400 * 0.25 * 0.75)
    for training, key in ((True, "training"), (False, "evaluation")):
        by_sequence = thor(tokens, {key: "sequence"}, training=training)
        assert (by_sequence == by_sequence[:, :1]).all()
        assert by_sequence.unique().numel() == 4
        by_token = thor(tokens, {key: "token"}, training=training)
        assert (by_token.reshape(-1).bincount(minlength=4) - 64).abs().max() < SIGMAS * math.sqrt(256 * 0.25 * 0.75)
        assert not (by_token == by_token[:, :1]).all(1).any()


def test_thor_averages_in_evaluation_if_asked() -> None:
    layer = Case("thor", 4, {"evaluation": "average"}).layer()
    tokens = Tokens.draw(8)
    y_TD, _ = run(layer, tokens, training=False)
    each = [torch.stack([layer.bank.expert(x_D, expert) for x_D in tokens.x_TD]) for expert in range(4)]
    torch.testing.assert_close(y_TD, torch.stack(each).mean(0))


def test_thor_draws_the_same_in_every_process() -> None:
    router, tokens = Case("thor", 4).router(), Tokens.draw(4)
    for seed in range(8):
        parts = [
            router(
                tokens.x_TD,
                replace(tokens.context(training=True, seed=seed), span=Span(start=start, length=4, total=8)),
            )
            for start in (0, 4)
        ]
        assert torch.cat([part.expert_N for part in parts]).unique().numel() == 1


def test_who_draws_in_evaluation_depends_on_the_batch() -> None:
    drawing = {entry.name for entry in ROUTERS.entries() if entry.facts.causality.draws_in_evaluation}
    assert {"random", "thor", "conditional_computation"} <= drawing
    assert all(ROUTERS.get(name).facts.causality.batch_dependent for name in drawing)
