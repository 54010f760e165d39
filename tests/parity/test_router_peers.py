"""Our routers select and weight as those of published models in transformers do."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import Case, Tokens, route
from torch import Tensor

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = {
    "hidden_size": 8, "num_local_experts": 8, "num_experts": 8, "router_jitter_noise": 0.01, "input_jitter_noise": 0.0,
}  # fmt: skip


def build_peer(model: str, name: str, **options: Any) -> torch.nn.Module:
    """Build a router of transformers with the sizes of the test cases."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)(SimpleNamespace(**SIZES, **options))


def table(expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return torch.zeros(len(expert_TK), 8).scatter(-1, expert_TK, weight_TK)


@pytest.mark.parametrize(
    ("case", "model", "name", "options"),
    [
        (Case("mixtral"), "mixtral", "MixtralTopKRouter", {"num_experts_per_tok": 2}),
        (
            Case("olmoe", options={"top_k": 3}),
            "olmoe",
            "OlmoeTopKRouter",
            {"num_experts_per_tok": 3, "norm_topk_prob": False},
        ),
        (
            Case("deepseek_moe", options={"top_k": 3, "num_groups": 4, "kept_groups": 2, "scale": 16.0}),
            "deepseek_v2",
            "DeepseekV2TopkRouter",
            {
                "num_experts_per_tok": 3,
                "routed_scaling_factor": 16.0,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
            },
        ),
        (
            Case("deepseek_v3", options={"top_k": 3, "num_groups": 4, "kept_groups": 2}),
            "deepseek_v3",
            "DeepseekV3TopkRouter",
            {
                "num_experts_per_tok": 3,
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": True,
                "n_group": 4,
                "topk_group": 2,
            },
        ),
        (Case("sparse_mixer"), "phimoe", "PhimoeTopKRouter", {"num_experts_per_tok": 2}),
    ],
    ids=["mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "sparse_mixer"],
)
def test_weights_and_gradients_match_transformers(case: Case, model: str, name: str, options: dict[str, Any]) -> None:
    ours, theirs = case.router(), build_peer(model, name, **options).eval()
    bias_E = torch.linspace(-0.3, 0.3, 8)[torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])]
    with torch.no_grad():
        theirs.weight.copy_(ours.gate.weight_ED)
        if hasattr(ours, "bias_E"):
            ours.bias_E.copy_(bias_E)
            theirs.e_score_correction_bias.copy_(bias_E)
    tokens = Tokens.draw(200)
    routing = route(ours, tokens, training=False)
    _, weight_TK, expert_TK = theirs(tokens.x_TD)
    expected_TE = table(expert_TK, weight_TK)
    torch.testing.assert_close(table(routing.expert_N.view(200, -1), routing.weight_N.view(200, -1)), expected_TE)
    pull_TE = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    (expected_TE * pull_TE).sum().backward()
    (table(routing.expert_N.view(200, -1), routing.weight_N.view(200, -1)) * pull_TE).sum().backward()
    torch.testing.assert_close(ours.gate.weight_ED.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)
