"""Several parents and new experts on several processes: the weights of all together are those of one process."""

from pathlib import Path
from typing import Any

import torch
from support.parent_runs import PARENT, build_child, child_config, train_parent
from support.process_group import ALONE, Mesh, Shape
from support.training_cases import write_text
from support.training_steps import gather_tensor
from torch import Tensor

from moebench.training.initial_weights.new_experts import fill_new_experts
from moebench.training.model import prepare_task

OTHER, SPARSE, DOMAINS = "1" * 12, "2" * 12, "3" * 12
EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_width": None, "match": "none"}
TWO = EXPERTS | {"num_experts": 2}
CASES: dict[str, dict[str, Any]] = {
    "experts": {"layout": EXPERTS, "init": {"from": [f"run:{PARENT}", f"run:{OTHER}"], "combine": "experts"}},
    "average": {
        "layout": EXPERTS,
        "init": {"from": [f"run:{SPARSE}", f"run:{SPARSE}"], "combine": "average", "combine_weights": [1, 2]},
    },
    "mean": {"layout": EXPERTS | {"num_experts": 6}, "init": {"from": f"run:{SPARSE}", "new_experts": "mean"}},
    "nearest": {
        "layout": EXPERTS,
        "router": {"name": "domain", "domains": ["xyz", "ab"]},
        "init": {"from": f"run:{DOMAINS}", "new_experts": "random"},
    },
}


def take(mesh: Mesh, text: Path, results: Path) -> dict[str, dict[str, Tensor]]:
    """Return the weights of every case after they were taken."""
    states = {}
    for name, overrides in CASES.items():
        config = child_config(text, **{"router": "top_k", **overrides})
        model, _ = build_child(config, results, mesh)
        fill_new_experts(config, model, prepare_task(config, results), mesh)
        states[name] = {key: gather_tensor(value) for key, value in model.state_dict().items()}
    return states


def test_every_mesh_combines_the_same_weights(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for run_id, overrides in (
        (PARENT, {}),
        (OTHER, {"seed": 1}),
        (SPARSE, {"router": "top_k", "layout": EXPERTS}),
        (DOMAINS, {"router": "domain", "layout": TWO}),
    ):
        train_parent(tmp_path, text, run_id=run_id, **overrides)
    [expected] = ALONE.run(take, text, tmp_path)
    for given in Shape(1, 2).run(take, text, tmp_path):
        for name, state in expected.items():
            assert all(torch.equal(given[name][key], state[key]) for key in state), name
