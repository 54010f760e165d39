"""Whether a model whose experts are copies of a dense network computes what the dense model does: measured."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.config import merge_settings, resolve, to_plain
from moebench.init_config import InitConfig
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.evaluation import batch_context
from moebench.training.initial_weights.parent import ParentWeights
from moebench.training.initial_weights.plan import plan_load
from moebench.training.model import Model, build_initialised_model

TOLERANCE = 1e-3
"""Largest difference of outputs that counts as rounding; weights that do not sum to 1 change them by far more."""
FFN_WIDTH = 16
NUM_SEQUENCES = 2


class ModelWeights(ParentWeights):
    """The weights of a model in memory."""

    def __init__(self, model: Model) -> None:
        self.label = "a dense model"
        self.settings = {"router": {"name": "dense"}}
        self.state = model.state_dict()
        self.shapes = {name: value.shape for name, value in self.state.items()}

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self.state[name])


@torch.no_grad()
def starts_as_dense_parent(config: CellConfig, task: Task) -> bool:
    """Return whether copies of a dense network, without noise, give its output, on a narrow model of the same kind."""
    from moebench.training.initial_weights.load import take_weights

    narrow = _shrink(config)
    dense = replace(narrow, router=resolve({"router": "dense"}).router)
    parent, child = (build_initialised_model(cell, task).eval() for cell in (dense, narrow))
    weights, state = ModelWeights(parent), child.state_dict()
    plan = plan_load(narrow, {name: value.shape for name, value in state.items()}, weights)
    take_weights(narrow, plan, state, weights)
    batch = task.eval_batches("validation", NUM_SEQUENCES)[0]
    ctx = batch_context(batch, training=False, seed=config.seed)
    expected, given = (model.compute_hidden(batch, ctx)[0] for model in (parent, child))
    return bool((given - expected).abs().max() <= TOLERANCE)


def _shrink(config: CellConfig) -> CellConfig:
    """Return the cell with narrow networks and heads, and copies of all experts."""
    model = {"d_model": 2 * config.model.num_heads, "ffn_width": FFN_WIDTH}
    layout = {"match": "none", "expert_width": None}
    narrow = resolve(merge_settings(to_plain(config), {"model": model, "layout": layout}))
    train = replace(narrow.train, mup_base_width=None, trainable="all", precision="fp32")
    return replace(narrow, init=InitConfig(), train=train)
