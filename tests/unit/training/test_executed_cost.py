"""What MoE layers executed: sums by hand, whole runs against an independent count, and routers that say a wrong k."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moebench.training.evaluation import batch_context
from moebench.training.executed_cost import ExecutedCost
from support.cases import Case
from support.layout_models import backbone_of, batch, config_of
from support.training_cases import Run, tiny_config, write_text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebench.experts.layer import MoELayer
from moebench.parallel.mesh import SINGLE_PROCESS_MESH
from moebench.registry import load_plugin
from moebench.routing.contract import RouterContractError
from moebench.routing.routers.top_k import TopK
from moebench.routing.values import LayerRecord, Routing
from moebench.training.model import initialised_model, prepare_task

MEASURED = ("train_flops_per_token", "eval_flops_per_token", "train_experts_per_token", "eval_experts_per_token")


def record_of(layer: MoELayer, kept: list[bool], valid: list[bool] | None = None) -> LayerRecord:
    """Two experts for each of three tokens, of which some assignments are dropped."""
    expert_TK = torch.tensor([[0, 1], [1, 2], [2, 3]])
    routing = Routing.from_top_k(expert_TK, torch.ones(3, 2), num_experts=8)
    valid_T = None if valid is None else torch.tensor(valid)
    if valid_T is not None:
        routing = routing.keep(valid_T[routing.token_N])
    kept_routing = routing.keep(torch.tensor(kept))
    return LayerRecord(layer=layer.name, routing=routing, kept=kept_routing, valid_T=valid_T, sequence_length=3)


def test_sums_by_hand() -> None:
    layer = Case("top_k").layer()
    per_row = layer.bank.flops_per_row_E()[0]
    execution = ExecutedCost([layer])
    execution.add([record_of(layer, [True, True, True, False, False, False])])  # 3 rows; the third token unserved
    execution.add([record_of(layer, [True] * 6)])  # 6 rows
    execution.share(SINGLE_PROCESS_MESH)
    # 12 rows were planned: 3 less; 6 positions; 9 rows; 12 assignments chosen; 1 token unserved; none with another k.
    assert execution.state() == [[-3 * per_row, 6, 9, 12, 1, 0]]
    assert execution.losses() == {"drop_rate": 0.25, "unserved": pytest.approx(1 / 6)}
    execution.check_declared()  # 12 chosen assignments for 6 tokens: the declared 2, whatever was dropped


def test_padding_is_no_position() -> None:
    layer = Case("top_k").layer()
    execution = ExecutedCost([layer])
    execution.add([record_of(layer, [True] * 6, valid=[True, True, False])])
    execution.share(SINGLE_PROCESS_MESH)
    assert execution.state() == [[0, 2, 4, 4, 0, 0]]
    execution.check_declared()


def test_a_right_mean_of_wrong_numbers_is_no_declared_k() -> None:
    layer = Case("top_k").layer()
    token_N, expert_N = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
    routing = Routing(token_N=token_N, expert_N=expert_N, weight_N=torch.ones(4), num_tokens=2, num_experts=8)
    execution = ExecutedCost([layer])
    execution.add([LayerRecord(layer=layer.name, routing=routing, kept=routing, sequence_length=2)])
    execution.share(SINGLE_PROCESS_MESH)
    assert execution.state()[0][1:] == [2, 4, 4, 0, 2]
    with pytest.raises(RouterContractError, match="uses 2 experts per token on average"):
        execution.check_declared()


@pytest.mark.parametrize(
    "router",
    [
        {"name": "domain", "evaluation": "prior"},
        {"name": "thor", "evaluation": "average"},
        {"name": "routing_networks", "pass_through": True},
        {"name": "routing_networks_wpl", "pass_through": True},
    ],
    ids=lambda router: router["name"],
)
def test_options_that_vary_the_number_of_experts_are_no_wrong_k(router: dict[str, Any], tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router=router, train={"steps": 3}), tmp_path)()
    assert result is not None
    assert any(
        result.cost[f"{phase}_experts_per_token"] != result.cost["experts_per_token"] for phase in ("train", "eval")
    )


def test_attention_of_experts_costs_nothing_at_padding() -> None:
    """As in a dense model, positions are counted, whatever padding stands beside them."""
    backbone = backbone_of(config_of("moduleformer", "top_k"))
    x_BLD, ctx = batch(training=False)
    valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool)
    valid_BL[0, 5:] = False
    _, records = backbone(x_BLD, replace(ctx, valid_BL=valid_BL))
    execution = ExecutedCost(backbone.moe_layers())
    execution.add(records)
    execution.share(SINGLE_PROCESS_MESH)
    assert [sums[0] for sums in execution.state()] == [0] * len(records)


def test_a_shared_embedding_is_trained_by_a_run_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), router={"name": "speech_moe", "embedding": "shared"})
    task = prepare_task(config, tmp_path)
    model = initialised_model(config, task).double()
    whole = task.train_batch(4, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(whole, batch_context(whole, training=True, seed=0))
        model.shared.head(model.shared(model.embedding(whole.input_BL)))
    result = Run(config, tmp_path)()
    assert result is not None
    assert result.cost["train_flops_per_token"] == counter.get_total_flops() / (4 * 8)
    assert result.cost["train_flops_per_token"] > result.cost["eval_flops_per_token"]


def test_state_goes_on_where_it_was() -> None:
    layer = Case("top_k").layer()
    first, second = ExecutedCost([layer]), ExecutedCost([layer])
    first.add([record_of(layer, [True] * 6)])
    first.share(SINGLE_PROCESS_MESH)
    second.load_state(first.state())
    second.add([record_of(layer, [True] * 6)])
    second.share(SINGLE_PROCESS_MESH)
    assert second.state() == [[2 * value for value in first.state()[0]]]


def count_assignments(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[int]]:
    """Return [assignments computed, tokens] of all forward passes, by whether they train: counted in the layer."""
    seen = {True: [0, 0], False: [0, 0]}
    forward = MoELayer.forward

    def counting(self: MoELayer, x_TD: torch.Tensor, ctx: Any) -> Any:
        y_TD, record = forward(self, x_TD, ctx)
        seen[ctx.training][0] += len(set(zip(*(pairs.tolist() for pairs in pairs_of(record.kept)), strict=True)))
        seen[ctx.training][1] += x_TD.shape[0]
        return y_TD, record

    monkeypatch.setattr(MoELayer, "forward", counting)
    return seen


def pairs_of(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    compact = routing.compact()
    return compact.token_N, compact.expert_N


@pytest.mark.parametrize("router", ["top_p", "dynmoe", "null_experts", "switch"])
def test_a_run_reports_what_it_executed(router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = {"capacity_factor_train": 0.75} if router == "switch" else {}
    config = tiny_config(write_text(tmp_path), router=router, layout={"num_experts": 8, **capacity})
    seen = count_assignments(monkeypatch)
    result = Run(config, tmp_path)()
    assert result is not None
    model = initialised_model(config, prepare_task(config, tmp_path))
    layers = model.backbone.moe_layers()
    per_row = layers[0].bank.flops_per_row_E()[0]
    experts = seen[True][0] / seen[True][1]
    assert result.cost["train_experts_per_token"] == pytest.approx(experts, rel=1e-12)
    excess = len(layers) * per_row * (experts - result.cost["experts_per_token"])
    assert result.cost["train_flops_per_token"] == pytest.approx(result.cost["flops_per_token"] + excess, rel=1e-9)
    assert result.cost["eval_experts_per_token"] == result.metrics["load/experts_per_token"]
    assert result.cost["eval_flops_per_token"] == result.metrics["load/flops_per_token"]
    if router == "switch":
        assert result.metrics["load/train_drop_rate"] == pytest.approx(1 - experts)
        assert (
            result.cost["train_flops_per_token"] < result.cost["flops_per_token"] == result.cost["eval_flops_per_token"]
        )
    if router in ("top_p", "dynmoe"):
        assert abs(experts / result.cost["experts_per_token"] - 1) > 0.02  # what a plan does not show


def test_evaluation_measures_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(write_text(tmp_path), router="top_p", layout={"num_experts": 8}, train={"steps": 2})
    run = Run(config, tmp_path)
    run()
    seen = count_assignments(monkeypatch)
    result = run()  # done: it is evaluated once more, on the test split alone
    assert result is not None
    assert seen[True] == [0, 0]
    assert result.cost["eval_experts_per_token"] == pytest.approx(seen[False][0] / seen[False][1], rel=1e-12)


def test_a_dense_model_executes_its_plan(tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router="dense"), tmp_path)()
    assert result is not None
    assert result.cost["experts_per_token"] == 0
    assert all(result.cost[f"{phase}_flops_per_token"] == result.cost["flops_per_token"] for phase in ("train", "eval"))
    assert "load/train_drop_rate" not in result.metrics


def test_two_passes_cost_twice(tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router="thor"), tmp_path)()
    assert result is not None
    assert result.cost["train_flops_per_token"] == 2 * result.cost["flops_per_token"]
    assert result.cost["eval_flops_per_token"] == result.cost["flops_per_token"]


def test_a_resumed_run_has_the_means_of_all_steps(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    config = tiny_config(text, router="top_p", layout={"num_experts": 8})
    expected = Run(config, whole)()
    assert Run(config, halved)(stop_at=5) is None
    resumed = Run(config, halved)()
    assert expected is not None
    assert resumed is not None
    assert [resumed.cost[name] for name in MEASURED] == [expected.cost[name] for name in MEASURED]


def test_a_wrong_k_ends_the_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopK, "experts_per_token", classmethod(lambda cls, config, num_experts: 1))
    with pytest.raises(RouterContractError) as caught:
        Run(tiny_config(write_text(tmp_path), router="top_k"), tmp_path)()
    assert re.fullmatch(
        r"router 'top_k' \(.*top_k\.py:\d+\) uses 2 experts per token on average in layer 0, but experts_per_token"
        r" says 1 for each \(correct it, or set Facts\.variable_k=True\)",
        str(caught.value),
    )


PLUGIN = '''
from dataclasses import dataclass

from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterConfig, RouterBuildContext
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice", equation="y = x", paper="arXiv:0000.00000",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
    )
)
class SecretlyTwo(Router):
    """Send each token to two experts and declare nothing."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options."""

        name: str = "secretly_two"

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Take the two best."""
        weight_TK, expert_TK = self.gate(x_TD).softmax(-1).topk(2)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
'''


def test_a_plugin_that_declares_nothing_fails_its_cell(plugin: Any, tmp_path: Path) -> None:
    load_plugin(plugin.write(PLUGIN, name="secretly_two.py"))
    with pytest.raises(
        RouterContractError, match=r"'secretly_two' \(.*\) uses 2 experts per token on average in layer 0"
    ):
        Run(tiny_config(write_text(tmp_path), router="secretly_two"), tmp_path)()
