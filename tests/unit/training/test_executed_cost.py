"""Executed cost: sums by hand, full runs against an independent count, and routers that declare a wrong k."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
from moebench.training.evaluation import batch_context
from moebench.training.executed_cost import ExecutedCost
from moebench.training.model import build_initialised_model, prepare_task

MEASURED = ("train_flops_per_token", "eval_flops_per_token", "train_experts_per_token", "eval_experts_per_token")


def record_of(layer: MoELayer, kept: list[bool], valid: list[bool] | None = None) -> LayerRecord:
    """Return a record of three tokens with two experts each, of which only some assignments are kept."""
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
    executed = ExecutedCost([layer])
    executed.add([record_of(layer, [True, True, True, False, False, False])])  # 3 rows; the third token unserved
    executed.add([record_of(layer, [True] * 6)])  # 6 rows
    executed.all_reduce(SINGLE_PROCESS_MESH)
    # 3 of 12 planned rows are missing; 6 positions; 9 rows; 12 assignments; 1 unserved token; none with another k.
    assert executed.to_list() == [[-3 * per_row, 6, 9, 12, 1, 0]]
    assert executed.drop_rates() == {"drop_rate": 0.25, "unserved": pytest.approx(1 / 6)}
    executed.check_experts_per_token()  # 12 assignments of 6 tokens: the declared 2, before drops


def test_padding_is_not_counted() -> None:
    layer = Case("top_k").layer()
    executed = ExecutedCost([layer])
    executed.add([record_of(layer, [True] * 6, valid=[True, True, False])])
    executed.all_reduce(SINGLE_PROCESS_MESH)
    assert executed.to_list() == [[0, 2, 4, 4, 0, 0]]
    executed.check_experts_per_token()


def test_declared_k_on_average_only_is_refused() -> None:
    layer = Case("top_k").layer()
    token_N, expert_N = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
    routing = Routing(token_N=token_N, expert_N=expert_N, weight_N=torch.ones(4), num_tokens=2, num_experts=8)
    executed = ExecutedCost([layer])
    executed.add([LayerRecord(layer=layer.name, routing=routing, kept=routing, sequence_length=2)])
    executed.all_reduce(SINGLE_PROCESS_MESH)
    assert executed.to_list()[0][1:] == [2, 4, 4, 0, 2]
    with pytest.raises(RouterContractError, match="uses 2 experts per token on average"):
        executed.check_experts_per_token()


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
def test_options_that_vary_the_number_of_experts_are_accepted(router: dict[str, Any], tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router=router, train={"steps": 3}), tmp_path)()
    assert result is not None
    assert any(
        result.cost[f"{phase}_experts_per_token"] != result.cost["experts_per_token"] for phase in ("train", "eval")
    )


def test_attention_experts_cost_nothing_at_padding() -> None:
    # As in a dense model, where the cost of attention depends on positions, not on padding.
    backbone = backbone_of(config_of("moduleformer", "top_k"))
    x_BLD, ctx = batch(training=False)
    valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool)
    valid_BL[0, 5:] = False
    _, records = backbone(x_BLD, replace(ctx, valid_BL=valid_BL))
    executed = ExecutedCost(backbone.moe_layers())
    executed.add(records)
    executed.all_reduce(SINGLE_PROCESS_MESH)
    assert [sums[0] for sums in executed.to_list()] == [0] * len(records)


def test_training_cost_includes_the_loss_of_a_shared_embedding(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), router={"name": "speech_moe", "embedding": "shared"})
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task).double()
    batch = task.train_batch(4, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, batch_context(batch, training=True, seed=0))
        model.shared.head(model.shared(model.embedding(batch.input_BL)))
    result = Run(config, tmp_path)()
    assert result is not None
    assert result.cost["train_flops_per_token"] == counter.get_total_flops() / (4 * 8)
    assert result.cost["train_flops_per_token"] > result.cost["eval_flops_per_token"]


def test_restored_sums_continue() -> None:
    layer = Case("top_k").layer()
    first, second = ExecutedCost([layer]), ExecutedCost([layer])
    first.add([record_of(layer, [True] * 6)])
    first.all_reduce(SINGLE_PROCESS_MESH)
    second.load_list(first.to_list())
    second.add([record_of(layer, [True] * 6)])
    second.all_reduce(SINGLE_PROCESS_MESH)
    assert second.to_list() == [[2 * value for value in first.to_list()[0]]]


def count_assignments(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[int]]:
    """Count [assignments computed, tokens] of all forward passes, in training (True) and in evaluation (False)."""
    counts = {True: [0, 0], False: [0, 0]}
    forward = MoELayer.forward

    def forward_and_count(self: MoELayer, x_TD: torch.Tensor, ctx: Any) -> Any:
        y_TD, record = forward(self, x_TD, ctx)
        counts[ctx.training][0] += len(set(zip(*(pairs.tolist() for pairs in pairs_of(record.kept)), strict=True)))
        counts[ctx.training][1] += x_TD.shape[0]
        return y_TD, record

    monkeypatch.setattr(MoELayer, "forward", forward_and_count)
    return counts


def pairs_of(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    compact = routing.compact()
    return compact.token_N, compact.expert_N


@pytest.mark.parametrize(
    "router", ["top_p", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dynmoe", "null_experts")), "switch"]
)
def test_result_has_the_executed_cost(router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = {"capacity_factor_train": 0.75} if router == "switch" else {}
    config = tiny_config(write_text(tmp_path), router=router, layout={"num_experts": 8, **capacity})
    counts = count_assignments(monkeypatch)
    result = Run(config, tmp_path)()
    assert result is not None
    model = build_initialised_model(config, prepare_task(config, tmp_path))
    layers = model.backbone.moe_layers()
    per_row = layers[0].bank.flops_per_row_E()[0]
    experts = counts[True][0] / counts[True][1]
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
        assert abs(experts / result.cost["experts_per_token"] - 1) > 0.02  # which the plan does not show


def test_evaluation_cost_is_that_of_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(write_text(tmp_path), router="top_p", layout={"num_experts": 8}, train={"steps": 2})
    run = Run(config, tmp_path)
    run()
    counts = count_assignments(monkeypatch)
    result = run()  # finished: evaluated once more, on the test split only
    assert result is not None
    assert counts[True] == [0, 0]
    assert result.cost["eval_experts_per_token"] == pytest.approx(counts[False][0] / counts[False][1], rel=1e-12)


def test_dense_model_executes_its_plan(tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router="dense"), tmp_path)()
    assert result is not None
    assert result.cost["experts_per_token"] == 0
    assert all(result.cost[f"{phase}_flops_per_token"] == result.cost["flops_per_token"] for phase in ("train", "eval"))
    assert "load/train_drop_rate" not in result.metrics


def test_two_passes_cost_twice_as_much(tmp_path: Path) -> None:
    result = Run(tiny_config(write_text(tmp_path), router="thor"), tmp_path)()
    assert result is not None
    assert result.cost["train_flops_per_token"] == 2 * result.cost["flops_per_token"]
    assert result.cost["eval_flops_per_token"] == result.cost["flops_per_token"]


def test_resumed_run_has_the_means_of_all_steps(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    full, halved = tmp_path / "full", tmp_path / "halved"
    config = tiny_config(text, router="top_p", layout={"num_experts": 8})
    expected = Run(config, full)()
    assert Run(config, halved)(stop_at=5) is None
    resumed = Run(config, halved)()
    assert expected is not None
    assert resumed is not None
    assert [resumed.cost[name] for name in MEASURED] == [expected.cost[name] for name in MEASURED]


def test_wrong_k_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopK, "experts_per_token", classmethod(lambda cls, config, num_experts: 1))
    with pytest.raises(RouterContractError) as error:
        Run(tiny_config(write_text(tmp_path), router="top_k"), tmp_path)()
    assert re.fullmatch(
        r"router 'top_k' \(.*top_k\.py:\d+\) uses 2 experts per token on average in layer 0, but experts_per_token"
        r" declares 1 for each \(correct it, or set Facts\.variable_k=True\)",
        str(error.value),
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


def test_plugin_without_declared_k_fails_its_cell(plugin: Any, tmp_path: Path) -> None:
    load_plugin(plugin.write(PLUGIN, name="secretly_two.py"))
    with pytest.raises(
        RouterContractError, match=r"'secretly_two' \(.*\) uses 2 experts per token on average in layer 0"
    ):
        Run(tiny_config(write_text(tmp_path), router="secretly_two"), tmp_path)()
