import pytest
import torch
from contract.training_cases import tiny_config, write_text

from moebench.routing.metrics import label_table, relative_flops
from moebench.routing.mixing import SoftRouting
from moebench.training.evaluate import evaluate
from moebench.training.model import initialised_model, prepare_task


def test_relative_flops_by_hand() -> None:
    # Experts that cost 10 and 30: 20 on average. Three tokens to the small one, one to the large: (30 + 30) / 80.
    assert relative_flops(torch.tensor([3, 1]), (10, 30)) == 0.75
    assert relative_flops(torch.tensor([2, 2]), (10, 30)) == 1.0
    assert relative_flops(torch.tensor([5, 1]), (7, 7)) == 1.0
    assert relative_flops(torch.tensor([0, 0]), (10, 30)) == 1.0


@pytest.mark.parametrize(("layout", "reported"), [("heterogeneous", True), ("every_n", False)])
def test_evaluation_says_what_unequal_experts_cost(tmp_path, layout: str, reported: bool) -> None:
    config = tiny_config(write_text(tmp_path), layout={"name": layout, "num_experts": 4, "expert_width": 8})
    task = prepare_task(config, tmp_path)
    model = initialised_model(config, task)
    load = evaluate(model, task, task.eval_batches("test", 4), 0, "cpu").load
    assert ("load/flops" in load) is reported
    if reported:
        costs = [layer.bank.flops_per_row_E() for layer in model.backbone.moe_layers()]
        least, most = (min(map(choose, costs)) * 4 / sum(costs[0]) for choose in (min, max))
        assert least <= load["load/flops"] <= most


def test_labels_of_no_tokens_are_counted_as_none() -> None:
    empty_BLS = torch.zeros(0, 5, 8)
    routing = SoftRouting(dispatch_BLS=empty_BLS, combine_BLS=empty_BLS, num_experts=4)
    assert not label_table(routing, torch.zeros(0, dtype=torch.int64), 3).any()
