"""A process without a sequence: a batch may have fewer sequences than there are processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import tiny_config, write_text

from moebench.experts.layout import LAYOUTS
from moebench.ranks import Span
from moebench.training.evaluation import batch_context, evaluation_mode
from moebench.training.executed_cost import ExecutedCost
from moebench.training.model import build_initialised_model, prepare_task

# `oracle` is of another task; the other two split an expert into parts that no tiny width has.
OF_TINY_WIDTHS = [name for name in LAYOUTS.names() if name not in ("oracle", "fine_grained", "hierarchical")]


@pytest.mark.parametrize("router", ["top_k", "top_p"])
@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("layout", OF_TINY_WIDTHS)
def test_every_layout_evaluates_no_sequence(tmp_path: Path, layout: str, capacity: float | None, router: str) -> None:
    options: dict[str, Any] = {"name": layout, "expert_width": None, "capacity_factor_eval": capacity}
    config = tiny_config(write_text(tmp_path), router=router, model={"ffn_width": 64}, layout=options)
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task)
    batch = task.eval_batches("validation", 4)[0]
    count = len(batch.domain_B)
    part = batch.part(Span(start=count, length=0, total=count, lengths=(count, 0)))
    cost = ExecutedCost(model.backbone.moe_layers())
    with evaluation_mode(model), torch.no_grad():
        output, records = model(part, batch_context(part, training=False, seed=0))
        cost.add(records)
        assert not any(value.any() for value in task.compute_sums(output, part).values())
