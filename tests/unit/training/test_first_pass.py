"""Rules of plug-ins that only a pass can break: wrong routings, losses, and draws from global random generators."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_plugins import ROUTER, TASK, assert_one_line, write_broken
from support.training_cases import TINY, Run, tiny_config, write_text

from moebench.config import merge_settings, resolve
from moebench.plugin_errors import ContractError
from moebench.registry import load_plugin
from moebench.routing.contract import find_routing_problem
from moebench.routing.values import Routing
from moebench.training.model import build_initialised_model, prepare_task

NAME, FORWARD = '        name: str = "broken"\n', "    def forward("
LOGITS = "        logits_TE = self.gate(x_TD)\n"
ASSIGNED = "            expert_TK, weight_TK, num_experts"


def with_loss(name: str, methods: str = "") -> tuple[str, str]:
    """Return a replacement that gives the router a loss of its own."""
    losses = f"        losses: dict[str, float] = field(default_factory=lambda: {{'{name}': 1.0}})\n"
    return NAME, f"{NAME}{losses}\n{methods}"


ROUTERS_AT_FAULT = {
    "noise of the process": (
        (LOGITS, f"{LOGITS}        logits_TE += torch.rand_like(logits_TE)\n"),
        ["of torch", "ctx.uniform"],
    ),
    "noise of numpy": (
        (LOGITS, f"        import numpy\n{LOGITS}        logits_TE = logits_TE + numpy.random.rand()\n"),
        ["forward draws from the global random generator of numpy"],
    ),
    "noise in evaluation alone": (
        (LOGITS, f"{LOGITS}        logits_TE = logits_TE if ctx.training else logits_TE + torch.rand(())\n"),
        ["forward draws from the global random generator of torch"],
    ),
    "dropout": (
        (LOGITS, "        logits_TE = nn.functional.dropout(self.gate(x_TD), training=ctx.training)\n"),
        ["forward draws from the global random generator of torch", "nn.Dropout"],
    ),
    "draws in a method that has no generator": (
        (
            FORWARD,
            f"    def objective(self, record):\n        return torch.rand(record.routing.num_tokens)\n\n{FORWARD}",
        ),
        ["training draws from the global random generator of torch"],
    ),
    "half of the tokens": (
        (LOGITS, "        logits_TE = self.gate(x_TD[::2])\n"),
        ["must route the 32 tokens of x_TD", "16"],
    ),
    "an expert that does not exist": (
        (ASSIGNED, ASSIGNED.replace("expert_TK,", "expert_TK + 1,")),
        ["expert_N from 0 to 3", "to 4"],
    ),
    "experts as numbers of another type": (
        (ASSIGNED, ASSIGNED.replace("expert_TK,", "expert_TK.int(),")),
        ["expert_N as int64, got torch.int32"],
    ),
    "another number of experts": (
        ("num_experts=self.num_experts", "num_experts=2 * self.num_experts"),
        ["must route to 4 experts, got num_experts=8"],
    ),
    "an objective for the batch": (
        (FORWARD, f"    def objective(self, record):\n        return record.token_loss_T.sum()\n\n{FORWARD}"),
        ["objective must return one value for each of the 32 tokens", "torch.float32 []"],
    ),
    "executed FLOPs that are a number": (
        (FORWARD, f"    def executed_flops(self, record):\n        return 3.0\n\n{FORWARD}"),
        ["executed_flops must return a tensor without dimensions, got float"],
    ),
    "statistics that are a tensor": (
        (
            FORWARD,
            f"    def statistics(self, record):\n        return record.load_E\n\n    after_step = print\n\n{FORWARD}",
        ),
        ["statistics must return tensors by name"],
    ),
}
OWN_LOSSES = {
    "a loss that is not returned": (
        with_loss("mine", "    def losses(self, record):\n        return {}\n"),
        ["losses must return 'mine', which Facts.own_losses names"],
    ),
    "a loss under another name": (
        with_loss("mine", "    def losses(self, record):\n        return {'mime': record.routing.weight_N.sum()}\n"),
        ["losses returned 'mime', Facts.own_losses has mine"],
    ),
    "a loss for each token": (
        with_loss("mine", "    def losses(self, record):\n        return {'mine': record.routing.weight_N}\n"),
        ["losses: 'mine' must be a tensor without dimensions, got torch.float32 [32]"],
    ),
    "a loss that is a number": (
        with_loss("mine", "    def losses(self, record):\n        return {'mine': 1.0}\n"),
        ["losses: 'mine' must be a tensor without dimensions, got float"],
    ),
    "no losses": (
        with_loss("mine", "    def losses(self, record):\n        pass\n"),
        ["losses must return losses by name, got NoneType"],
    ),
}
METHOD = "    def losses(self, record):\n        return "
WITHOUT_COEFFICIENT = {
    "a loss for each token": (
        (NAME, f"{NAME}\n{METHOD}{{'mine': record.routing.weight_N}}\n"),
        ["losses: 'mine' must be a tensor without dimensions, got torch.float32 [32]"],
    ),
    "a loss that is not returned": (
        (NAME, f"{NAME}\n{METHOD}{{}}\n"),
        ["losses must return 'mine', which Facts.own_losses names"],
    ),
}
"""Losses that the router's Config gives no coefficient, so training does not compute them."""
LOSS = """
from moebench.routing.losses import LOSSES, LossFacts


@LOSSES.register(LossFacts(equation="0", paper="none", uniform="0", collapsed="0"), name="mine")
def mine(record):
    return record.routing.logits_TE.square()
"""
TASKS_AT_FAULT = {
    "a head with dropout": (
        ("TokenHead(d_model, 16, bias=False)", "nn.Sequential(nn.Dropout(0.5), TokenHead(d_model, 16, bias=False))"),
        ["the module of build_head draws from the global random generator of torch"],
    ),
    "a loss with noise": (
        (
            "        return loss_T.view_as(batch.target_BP)\n",
            "        return loss_T.view_as(batch.target_BP) + torch.rand(())\n",
        ),
        ["training draws from the global random generator of torch"],
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(("change", "words"), ROUTERS_AT_FAULT.values(), ids=ROUTERS_AT_FAULT)
def test_passes_of_a_router(plugin: Any, text: Path, tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    path = write_broken(plugin, ROUTER, *change, "my_router.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        Run(tiny_config(text, router="broken"), tmp_path)()
    assert_one_line(caught.value, ["router 'broken'", *words], path)


@pytest.mark.parametrize(
    ("change", "words"),
    [*OWN_LOSSES.values(), *WITHOUT_COEFFICIENT.values()],
    ids=[*OWN_LOSSES, *(f"{name}, without a coefficient" for name in WITHOUT_COEFFICIENT)],
)
def test_losses_of_a_router(plugin: Any, text: Path, tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    declared = ROUTER.replace('equation="y = x",', 'equation="y = x", own_losses=("mine",),')
    path = write_broken(plugin, declared, *change, "my_router.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        Run(tiny_config(text, router="broken"), tmp_path)()
    assert_one_line(caught.value, ["router 'broken'", *words], path)


def test_a_loss_for_each_token_is_refused(plugin: Any, text: Path, tmp_path: Path) -> None:
    path = plugin.write(LOSS, name="my_loss.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        Run(tiny_config(text, router={"name": "switch", "losses": {"mine": 1.0}}), tmp_path)()
    words = ["loss 'mine'", "must be a tensor without dimensions, got torch.float32 [32, 4]"]
    assert_one_line(caught.value, words, path)


def test_a_loss_without_what_it_needs_names_the_router(plugin: Any, text: Path, tmp_path: Path) -> None:
    without = ROUTER.replace(", scores_TE=logits_TE.softmax(-1)", "")
    change = with_loss("load_balance")
    path = write_broken(plugin, without, *change, "my_router.py")
    load_plugin(path)
    with pytest.raises(ContractError) as caught:
        Run(tiny_config(text, router="broken"), tmp_path)()
    assert_one_line(caught.value, ["router 'broken'", "router.losses.load_balance: this router has no scores"], path)


@pytest.mark.parametrize(("change", "words"), TASKS_AT_FAULT.values(), ids=TASKS_AT_FAULT)
def test_draws_of_a_task(plugin: Any, tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    path = write_broken(plugin, TASK, *change, "my_task.py")
    load_plugin(path)
    plain = {section: TINY[section] for section in ("model", "layout", "train")}
    config = resolve(merge_settings(plain, {"task": {"name": "broken"}, "model": {"tie_embeddings": False}}))
    with pytest.raises(ContractError) as caught:
        Run(config, tmp_path)()
    assert_one_line(caught.value, ["task 'broken'", *words], path)


def test_draws_from_the_generator_of_the_context_are_allowed(plugin: Any, text: Path, tmp_path: Path) -> None:
    noise = f"{LOGITS}        logits_TE = logits_TE + ctx.uniform(len(x_TD), 4)\n"
    load_plugin(write_broken(plugin, ROUTER, LOGITS, noise, "my_router.py"))
    state = torch.get_rng_state()
    assert Run(tiny_config(text, router="broken"), tmp_path)() is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_modules_of_a_plugin_are_drawn_from_the_seed(plugin: Any, text: Path, tmp_path: Path) -> None:
    linear = ("Gate(context.d_model, context.num_experts)", "nn.Linear(context.d_model, context.num_experts)")
    load_plugin(write_broken(plugin, ROUTER, *linear, "my_router.py"))
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what else the process draws does not matter
        config = tiny_config(text, router="broken", seed=seed)
        model = build_initialised_model(config, prepare_task(config, tmp_path))
        weights.append(model.get_parameter("backbone.blocks.0.feed_forward.router.gate.weight"))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"token_N": torch.tensor([0, 1, 3])}, "token_N from 0 to 2, got 0 to 3"),
        ({"weight_N": torch.ones(2)}, "of one length, got token_N [3], expert_N [3], weight_N [2]"),
        ({"weight_N": torch.ones(3, dtype=torch.int64)}, "weight_N as float32, got torch.int64"),
        ({"token_N": torch.tensor([0, 0, 2])}, "must not send a token to one expert twice"),
        ({"token_N": torch.tensor([0, 0, 2]), "kept_N": torch.tensor([True, False, True])}, ""),
        ({"scores_TE": torch.ones(2, 4)}, "scores_TE of shape [3, 4], got [2, 4]"),
        ({"logits_TE": torch.ones(3)}, "logits_TE of shape [3, 4], got [3]"),
    ],
)
def test_values_of_a_routing(changes: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {
        "token_N": torch.arange(3),
        "expert_N": torch.tensor([1, 1, 0]),
        "weight_N": torch.ones(3),
    }
    routing = Routing(num_tokens=3, num_experts=4, **values | changes)
    problem = find_routing_problem(routing, num_tokens=3, num_experts=4)
    assert words in problem
    assert bool(problem) == bool(words)
