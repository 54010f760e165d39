"""StableMoE: training in stage 1, fixed routing in stage 2."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case, Tokens, build_context, route, run
from support.training_cases import Run, tiny_config, write_text
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord, Routing

STAGE_2 = {"stage_1_steps": 0}


def router_of(num_experts: int = 8, **options: Any) -> Any:
    return Case("stable_moe", num_experts, options).router()


def choose_by_student(router: Any, token_id_T: Tensor) -> Tensor:
    """Return the student's expert for each id."""
    expert_T: Tensor = (router.embedding_VD[token_id_T] @ router.student.weight_ED.T).argmax(-1)
    return expert_T


def test_stage_1_routes_by_the_gate_and_stage_2_and_evaluation_by_the_student() -> None:
    tokens = Tokens.draw(64)
    router, frozen = router_of(), router_of(**STAGE_2)
    by_token_T = (tokens.x_TD @ router.gate.weight_ED.T).argmax(-1)
    by_id_T = choose_by_student(router, tokens.token_id_T)
    assert not torch.equal(by_token_T, by_id_T)
    for each, training, expected in (
        (router, True, by_token_T),
        (router, False, by_id_T),
        (frozen, True, by_id_T),
        (frozen, False, by_id_T),
    ):
        routing = route(each, tokens, training=training)
        assert torch.equal(routing.expert_N, expected)
        torch.testing.assert_close(
            routing.weight_N, (tokens.x_TD @ each.gate.weight_ED.T).sigmoid()[range(64), expected]
        )


def test_stage_2_begins_after_stage_1_steps() -> None:
    router, tokens = router_of(stage_1_steps=3), Tokens.draw(64)
    by_id_T = choose_by_student(router, tokens.token_id_T)
    uses_student = [
        torch.equal(router(tokens.x_TD, replace(tokens.context(training=True), step=step)).expert_N, by_id_T)
        for step in range(5)
    ]
    assert uses_student == [False, False, False, True, True]


def test_stage_2_ignores_the_token_vectors() -> None:
    layer, tokens = Case("stable_moe", 8, STAGE_2).layer(), Tokens.draw(64)
    other = replace(tokens, x_TD=-3 * tokens.x_TD.flip(0))
    _, record = run(layer, tokens, training=True)
    _, other_record = run(layer, other, training=True)
    assert torch.equal(record.routing.expert_N, other_record.routing.expert_N)


def test_stage_2_trains_the_gate_and_not_the_student() -> None:
    layer, tokens = Case("stable_moe", 8, STAGE_2).layer(), Tokens.draw(64)
    y_TD, record = run(layer, tokens, training=True)
    losses = layer.router.losses(record)
    assert all(loss == 0 and not loss.requires_grad for loss in losses.values())
    (y_TD.square().sum() + sum(losses.values())).backward()
    assert layer.router.gate.weight_ED.grad.any()
    assert layer.router.student.weight_ED.grad is None  # None, not 0, so that the optimizer skips it
    assert layer.router.embedding_VD.grad is None


def losses_of(choice: list[int], scores_TE: Tensor, student_TE: Tensor, valid_T: Tensor | None = None) -> list[float]:
    expert_T = torch.tensor(choice)
    routing = Routing.from_top_k(
        expert_T.unsqueeze(-1),
        scores_TE.gather(-1, expert_T.unsqueeze(-1)),
        num_experts=2,
        scores_TE=scores_TE,
        token_extras={"student_T": student_TE, "choice_T": expert_T},
    )
    routing = routing if valid_T is None else routing.keep(valid_T)
    losses = router_of(2).losses(LayerRecord(routing=routing, kept=routing, valid_T=valid_T))
    return [losses["balance"].item(), losses["distillation"].item()]


def test_losses_by_hand() -> None:
    scores_TE = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.7, 0.3], [0.4, 0.6]])
    uniform_TE, certain_TE = torch.zeros(4, 2), 100 * torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    # Loads 3 and 1: each is half the mean load away. Too many: σ of three tokens; too few: 1 - σ of the fourth.
    balance = 0.5 * (0.9 + 0.5 + 0.7 + (1 - 0.6)) / 4
    assert losses_of([0, 0, 0, 1], scores_TE, uniform_TE) == pytest.approx([balance, math.log(2)])
    assert losses_of([0, 0, 0, 1], scores_TE, certain_TE) == pytest.approx([balance, 0.0])
    assert losses_of([0, 0, 1, 1], scores_TE, uniform_TE)[0] == 0  # even loads
    valid_T = torch.tensor([True, True, False, True])  # loads 2 and 1 of 1.5 each
    padded = (0.9 / 3 + 0.5 / 3 + (1 - 0.6) / 3) / 3
    assert losses_of([0, 0, 0, 1], scores_TE, uniform_TE, valid_T) == pytest.approx([padded, math.log(2)])


def test_balance_has_the_gradient_of_the_papers_loss() -> None:
    # Σ_i (n_i/n̄ - 1) Σ_{t→i} σ_ti / T has the same gradient; it may be negative, ours not.
    scores_TE = torch.tensor([[0.1, 0.1], [0.1, 0.2], [0.1, 0.3], [0.4, 0.99]], requires_grad=True)
    expert_T = torch.tensor([0, 0, 0, 1])
    share_T = scores_TE[range(4), expert_T]
    paper = (torch.tensor([0.5, 0.5, 0.5, -0.5]) * share_T).sum() / 4
    routing = Routing.from_top_k(
        expert_T.unsqueeze(-1),
        share_T.unsqueeze(-1),
        num_experts=2,
        scores_TE=scores_TE,
        token_extras={"student_T": torch.zeros(4, 2), "choice_T": expert_T},
    )
    ours = router_of(2).losses(LayerRecord(routing=routing, kept=routing))["balance"]
    assert paper < 0 < ours
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores_TE, retain_graph=True)[0] for loss in (ours, paper)))


def test_training_freezes_the_student_after_stage_1(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    config = tiny_config(
        text, router={"name": "stable_moe", "stage_1_steps": 4}, train={"checkpoint_every": 2, "steps": 8}
    )
    run_cell = Run(config, tmp_path / "run")
    kept: dict[int, dict[str, Tensor]] = {}

    def keep(message: dict[str, Any]) -> None:
        if message["step"] in (2, 4, 6):
            kept[message["step"]] = run_cell.checkpoint(message["step"])["state_dict"]

    run_cell.progress = keep
    run_cell()
    kept[8] = run_cell.checkpoint(8)["state_dict"]
    student_names = [name for name in kept[8] if ".student." in name or "embedding_VD" in name]
    gate_names = [name for name in kept[8] if "router.gate" in name]
    assert len(student_names) == 4
    assert len(gate_names) == 2
    for name in student_names:
        assert not torch.equal(kept[2][name], kept[4][name])
        assert torch.equal(kept[4][name], kept[6][name])
        assert torch.equal(kept[4][name], kept[8][name])  # neither momentum nor weight decay changes it
    assert all(not torch.equal(kept[4][name], kept[8][name]) for name in gate_names)


def test_a_task_without_ids_is_refused() -> None:
    router_class = ROUTERS.get("stable_moe").item
    message = "^router.name: 'stable_moe' routes by token id, which this task does not have$"
    with pytest.raises(UsageError, match=message):
        router_class(router_class.Config(), build_context(8, vocab_size=None))
