"""Shares of scores whose sum is 0: a selection bias can choose experts whose part of the softmax rounds to 0."""

import pytest
import torch

from moebench.routing.token_choice import TopKRule, choose_top_k


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_experts_without_scores_have_no_weight_and_no_gradient(score: str) -> None:
    # exp(0 - 200) is 0 in fp32, and so is the sigmoid of -200.
    logits_TE = torch.tensor([[200.0, 0.0, 0.0], [0.0, -200.0, -200.0]])[[int(score == "sigmoid")]].requires_grad_()
    rule = TopKRule(top_k=2, score=score, ranks_scores=True, weights="shares")  # type: ignore[arg-type]
    expert_TK, weight_TK, _ = choose_top_k(logits_TE, rule, bias_E=torch.tensor([-2.0, 0.5, 0.5]))
    assert expert_TK.tolist() == [[1, 2]]
    assert weight_TK.tolist() == [[0.0, 0.0]]
    weight_TK.sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.tolist() == [[0.0, 0.0, 0.0]]
