"""Dense models as branches in memory: parents of a cell without runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support.parent_runs import WIDE
from support.training_cases import tiny_config
from torch import Tensor

from moebench.config import to_plain
from moebench.schema import CellConfig
from moebench.training.initial_weights.branch_domains import find_domain_router
from moebench.training.initial_weights.combining import join_parents
from moebench.training.initial_weights.load import LoadedWeights, take_weights
from moebench.training.initial_weights.parent import ParentWeights
from moebench.training.initial_weights.plan import plan_load
from moebench.training.model import Model, build_initialised_model, prepare_task

DOMAINS = ("ab", "xyz")
FEED_FORWARD = "feed_forward.w_"


class Branch(ParentWeights):
    """The weights of a model in memory."""

    def __init__(self, label: str, config: CellConfig, model: Model) -> None:
        self.label = label
        self.settings = to_plain(config)
        self.model = model
        self.config = config
        self.state = model.state_dict()
        self.shapes = {name: value.shape for name, value in self.state.items()}

    def load(self, targets: Mapping[str, Tensor]) -> None:
        for name, value in targets.items():
            value.copy_(self.state[name])


def draw_branches(text: Path, cache: Path, number: int = 2, *, is_shared_equal: bool = False) -> list[Branch]:
    """Return dense models of different seeds, each of one domain in turn.

    `is_shared_equal`: they differ in their feed-forward networks alone.
    """
    branches = []
    for seed in range(number):
        held_out = [domain for domain in DOMAINS if domain != DOMAINS[seed % 2]]
        config = tiny_config(text, router="dense", task={"data": {"held_out_domains": held_out}}, seed=seed, **WIDE)
        model = build_initialised_model(config, prepare_task(config, cache))
        draw_head(model, seed)
        if is_shared_equal and branches:
            ours, first = model.state_dict(), branches[0].state
            model.load_state_dict({name: ours[name] if FEED_FORWARD in name else first[name] for name in ours})
        branches.append(Branch(f"branch {seed}", config, model))
    return branches


def draw_head(model: Model, seed: int) -> None:
    """Draw the head of a model, which is zero before training."""
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))


def merge(
    text: Path, cache: Path, branches: Sequence[Branch], init: Mapping[str, Any], **overrides: Any
) -> tuple[CellConfig, Model, LoadedWeights]:
    """Return a cell, its model with the weights of the branches, and what was taken."""
    overrides = {"layout": {**WIDE["layout"], "num_experts": 2}} | overrides
    config = tiny_config(text, init={"from": ["run:0", "run:1"], **init}, **overrides)
    model = build_initialised_model(config, prepare_task(config, cache))
    state = model.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    router = find_domain_router(model)
    parent = join_parents(config, branches, shapes, () if router is None else router.domains)
    return config, model, take_weights(config, plan_load(config, shapes, parent), state, parent)
