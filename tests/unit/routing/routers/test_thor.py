"""THOR: random experts per batch, sequence or token; the consistency loss of two passes and its cost."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run
from support.task_data import write_pictures
from support.training_cases import tiny_config, write_text
from torch import Tensor

from moebench.ranks import Span
from moebench.routing.features.consistency import divergence
from moebench.routing.features.feature import count_passes
from moebench.routing.router import ROUTERS
from moebench.training.batches import build_loss_normalizer
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, compute_model_cost, prepare_task
from moebench.training.module import CellModule

SIGMAS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def module_of(text: Path, folder: Path, router: dict[str, Any], **overrides: Any) -> CellModule:
    config = tiny_config(text, router={"name": "thor", **router}, **overrides)
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task), task)
    with torch.no_grad():  # the head starts at zero, where all passes agree
        for parameter in module.model.head.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return module


def compute_batch(module: CellModule, valid_BL: Tensor | None = None) -> tuple[Any, list[Any], list[Tensor]]:
    """Return what the first batch gives: the objective, the records of the passes, and their outputs."""
    count_BP = None if valid_BL is None else valid_BL.long()
    batch = replace(module.task.train_batch(4, 0, 0), valid_BL=valid_BL, count_BP=count_BP)
    outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
    computed, records = module.compute_loss(batch, outputs, records)
    return computed, records, outputs


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    # ½ (¼ ln 2 - ¼ ln ⅔) = ⅛ ln 3
    assert divergence(p, q).item() == pytest.approx(math.log(3) / 8)


@given(st.integers(2, 6), st.integers(0, 99))
def test_divergence_is_symmetric_and_not_negative(num_classes: int, seed: int) -> None:
    first, second = 3 * torch.randn(2, 5, num_classes, generator=torch.Generator().manual_seed(seed))
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    assert (divergence(p, q) > 0).all()
    assert torch.equal(divergence(p, q), divergence(q, p))
    assert not divergence(p, p).any()


def test_consistency_loss_is_0_if_both_passes_use_the_same_experts(text: Path, tmp_path: Path) -> None:
    one = {"layout": {"num_experts": 1}}  # both passes must use it
    assert compute_batch(module_of(text, tmp_path, {}, **one))[0].raw["consistency"] == 0
    computed, records, _ = compute_batch(module_of(text, tmp_path, {}))
    drawn = [[record.routing.expert_N.unique().tolist() for record in of_pass] for of_pass in records]
    assert drawn[0] != drawn[1]
    assert computed.raw["consistency"] > 1e-4


def test_task_loss_is_the_mean_of_both_passes_without_padding(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {"consistency": 3.0})
    valid_BL = torch.arange(8).expand(4, 8) < torch.tensor([[8], [5], [1], [0]])
    computed, _, outputs = compute_batch(module, valid_BL)
    batch = module.task.train_batch(4, 0, 0)
    losses = [module.task.loss(output, batch)[valid_BL].mean() for output in outputs]
    torch.testing.assert_close(computed.task, (losses[0] + losses[1]) / 2)
    assert losses[0] != losses[1]
    first, second = (output.log_softmax(-1)[valid_BL] for output in outputs)
    kl = [(a.exp() * (a - b)).sum(-1).mean() for a, b in ((first, second), (second, first))]
    torch.testing.assert_close(computed.raw["consistency"], (kl[0] + kl[1]) / 2)
    torch.testing.assert_close(computed.total, computed.task + 3 * computed.raw["consistency"])
    assert set(computed.parts()) == {"loss/task", "loss/total", "loss/consistency", "balance/consistency"}


def test_coefficient_of_0_makes_one_pass(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {"consistency": 0.0})
    computed, records, outputs = compute_batch(module)
    assert len(outputs) == len(records) == 1
    assert set(computed.parts()) == {"loss/task", "loss/total"}


def test_records_contain_both_passes(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, {}, train={"accumulate": 2})
    for index in range(2):
        module.training_step(module.task.train_batch(4, 0, 0, slice(2 * index, 2 * index + 2)), index)
    assert len(module.records) == 4
    assert len(module.objectives) == 2
    assert sum(int(records[0].routing.load_E.sum()) for records in module.records) == 2 * 4 * 8
    assert all(record.token_loss_T.shape == (16,) for records in module.records for record in records)


def test_gradients_do_not_depend_on_micro_batches(text: Path, tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, 2):
        module = module_of(text, tmp_path, {"consistency": 2.0}, train={"accumulate": accumulate})
        total = torch.zeros(())
        for index in range(accumulate):
            size = 4 // accumulate
            batch = module.task.train_batch(4, 0, 0, slice(size * index, size * index + size))
            ctx = batch_context(batch, training=True, seed=0)  # the same experts for every micro-batch
            computed, _ = module.compute_loss(
                batch, *module.run_passes(batch, ctx), build_loss_normalizer(batch, module.config, module.mesh)
            )
            total = total + computed.total / accumulate
        gradients.append(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))
    for full, accumulated in zip(*gradients, strict=True):
        assert (full is None) is (accumulated is None)
        if full is not None:
            torch.testing.assert_close(accumulated, full, rtol=1e-4, atol=1e-6)


def test_cost_includes_the_second_pass(text: Path, tmp_path: Path) -> None:
    costs = [
        compute_model_cost(module_of(text, tmp_path, {"consistency": consistency}).model, 8)
        for consistency in (0.0, 0.5)
    ]
    assert [cost.train_passes for cost in costs] == [1, 2]
    assert costs[1].training_flops == 2 * costs[0].training_flops == 2 * costs[0].flops_per_token


def test_passes_agree_on_the_class_of_an_image(tmp_path: Path) -> None:
    task = {"name": "vision", "patch": 4, "data": {"size": 8}}
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    module = module_of(write_pictures(pictures), tmp_path, {}, task=task)  # one prediction for a sequence of patches
    objective, _, outputs = compute_batch(module)
    first_BC, second_BC = (output.log_softmax(-1) for output in outputs)
    torch.testing.assert_close(objective.raw["consistency"], divergence(first_BC, second_BC).mean())
    assert objective.raw["consistency"] > 1e-6


def test_groups_make_two_passes_too(text: Path, tmp_path: Path) -> None:
    layout = {"name": "hierarchical", "num_experts": 4, "groups": 2}
    module = module_of(text, tmp_path, {"consistency": 0.7}, layout=layout)
    assert count_passes(module.model.features) == 2
    batch = module.task.train_batch(4, 0, 0)
    outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
    objective, _ = module.compute_loss(batch, outputs, records)
    torch.testing.assert_close(objective.weighted["consistency"], 0.7 * objective.raw["consistency"])


def route_experts(tokens: Tokens, options: dict[str, Any], *, training: bool, seed: int = 0) -> Tensor:
    """Return the expert of each token, int64 [B, L]."""
    routing = route(Case("thor", 4, options).router(), tokens, training=training, seed=seed)
    assert routing.weight_N.tolist() == [1.0] * len(tokens.x_TD)
    return routing.expert_N.view(-1, tokens.length)


def test_thor_draws_per_batch_sequence_or_token() -> None:
    tokens = Tokens.draw(256, length=8)
    per_batch = [route_experts(tokens, {}, training=True, seed=seed) for seed in range(400)]
    assert all(expert_BL.unique().numel() == 1 for expert_BL in per_batch)
    load_E = torch.stack([expert_BL[0, 0] for expert_BL in per_batch]).bincount(minlength=4)
    assert (load_E - 100).abs().max() < SIGMAS * math.sqrt(400 * 0.25 * 0.75)
    for training, key in ((True, "training"), (False, "evaluation")):
        by_sequence = route_experts(tokens, {key: "sequence"}, training=training)
        assert (by_sequence == by_sequence[:, :1]).all()
        assert by_sequence.unique().numel() == 4
        by_token = route_experts(tokens, {key: "token"}, training=training)
        assert (by_token.reshape(-1).bincount(minlength=4) - 64).abs().max() < SIGMAS * math.sqrt(256 * 0.25 * 0.75)
        assert not (by_token == by_token[:, :1]).all(1).any()


def test_evaluation_average_uses_all_experts() -> None:
    layer = Case("thor", 4, {"evaluation": "average"}).layer()
    tokens = Tokens.draw(8)
    y_TD, _ = run(layer, tokens, training=False)
    each = [torch.stack([layer.bank.expert(x_D, expert) for x_D in tokens.x_TD]) for expert in range(4)]
    torch.testing.assert_close(y_TD, torch.stack(each).mean(0))


def test_draw_per_batch_is_equal_on_all_ranks() -> None:
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


def test_routers_that_draw_in_evaluation_are_batch_dependent() -> None:
    drawing = {entry.name for entry in ROUTERS.entries() if entry.facts.causality.draws_in_evaluation}
    assert {"random", "thor", "conditional_computation"} <= drawing
    assert all(ROUTERS.get(name).facts.causality.batch_dependent for name in drawing)
