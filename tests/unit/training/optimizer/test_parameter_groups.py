"""Roles of parameters, and the learning rate, decay and optimizer that each gets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, assert_same_runs, tiny_config, write_text
from torch import nn

from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layout import LAYOUTS
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_initialised_model, prepare_task
from moebench.training.optimizer.build import build_optimizer
from moebench.training.optimizer.groups import ParameterRole, describe_parameters
from moebench.training.optimizer.muon import Muon

EVERYTHING: dict[str, Any] = {
    "layout": {"name": "residual", "num_experts": 4, "match": "none", "expert_width": None},
    "router": {"name": "mlp_top_k", "hidden_width": 6},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def build(text: Path, folder: Path, **overrides: Any) -> tuple[CellConfig, Model, Task]:
    config = tiny_config(text, **overrides)
    task = prepare_task(config, folder)
    return config, build_initialised_model(config, task), task


def roles_by_name(model: Model) -> dict[str, ParameterRole]:
    return {role.name: role for role in describe_parameters(model)}


def settings_by_name(config: CellConfig, model: Model, task: Task) -> dict[str, dict[str, Any]]:
    """Return the settings of each parameter in the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(config, model, task)
    settings = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert settings.keys() == set(names.values())
    return settings


def groups_of(model: Model) -> dict[str, set[str]]:
    """Return the last part of the names of the parameters in each group."""
    groups: dict[str, set[str]] = {}
    for role in describe_parameters(model):
        groups.setdefault(role.group, set()).add(role.name.rpartition(".")[0].rpartition(".")[2] or role.name)
    return groups


def test_every_parameter_has_the_group_of_its_module(text: Path, tmp_path: Path) -> None:
    _, model, _ = build(text, tmp_path, **EVERYTHING)
    assert groups_of(model) == {
        "embeddings": {"embedding"},
        "head": {"head"},
        "hidden": {"qkv", "out", "attention_norm", "feed_forward_norm", "norm", "shared"},
        "experts": {"bank"},
        "router": {"gate", "hidden_gate", "mix"},
    }


def test_a_network_that_routers_share_belongs_to_them(text: Path, tmp_path: Path) -> None:
    router = {"name": "speech_moe", "embedding": "shared", "embedding_width": 4}
    _, model, _ = build(text, tmp_path, router=router)
    roles = roles_by_name(model)
    assert {role.group for name, role in roles.items() if name.startswith("shared.")} == {"router"}


def test_an_output_that_shares_the_embedding_is_an_embedding(text: Path, tmp_path: Path) -> None:
    _, model, _ = build(text, tmp_path, router="dense")
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.embedding, nn.Embedding)
    model.head.weight = model.embedding.weight
    assert "head" not in groups_of(model)


def test_biases_and_gains_are_vectors_whatever_their_shape(text: Path, tmp_path: Path) -> None:
    config, model, task = build(text, tmp_path, router="top_k", train={"optimizer": "muon"})
    bank = next(module for module in model.modules() if isinstance(module, ExpertBank))
    bank.b_in_EF = nn.Parameter(torch.zeros(4, 8))
    model.embedding.gain_HD = nn.RMSNorm((2, 4))
    roles, settings = roles_by_name(model), settings_by_name(config, model, task)
    (bias,) = [name for name in roles if name.endswith("b_in_EF")]
    for name in (bias, "embedding.gain_HD.weight", "backbone.norm.weight"):
        assert roles[name].is_vector
        assert settings[name]["weight_decay"] == 0
        assert not settings[name]["uses_muon"]
    assert roles[bias].group == "experts"


def test_by_default_all_parameters_have_the_settings_of_one_adamw(text: Path, tmp_path: Path) -> None:
    config, model, task = build(text, tmp_path, **EVERYTHING)
    optimizer = build_optimizer(config, model, task)
    assert type(optimizer) is torch.optim.AdamW
    reference = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    keys = optimizer.param_groups[0].keys()
    assert keys == reference.param_groups[0].keys()
    for name, settings in settings_by_name(config, model, task).items():
        is_matrix = model.get_parameter(name).dim() >= 2
        assert settings["weight_decay"] == (config.train.weight_decay if is_matrix else 0)
        assert settings["lr"] == config.train.learning_rate
        assert settings["betas"] == (config.train.beta1, config.train.beta2)


def test_learning_rates_of_groups(text: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 0.02, "router_learning_rate": 0.0}
    rates |= {"embedding_learning_rate": 0.3, "head_learning_rate": 0.004}
    config, model, task = build(text, tmp_path, **EVERYTHING, train={"optimizer": "muon", **rates})
    expected = {"router": 0.0, "embeddings": 0.3, "head": 0.004, "experts": 0.02, "hidden": 0.02}
    roles = roles_by_name(model)
    for name, settings in settings_by_name(config, model, task).items():
        rate = 1e-3 if name.endswith("norm.weight") else expected[roles[name].group]
        assert settings["lr"] == rate, name
    config, model, task = build(text, tmp_path, **EVERYTHING, train={"expert_learning_rate": 0.5})
    rates_of_experts = [s["lr"] for name, s in settings_by_name(config, model, task).items() if ".bank." in name]
    assert rates_of_experts == [0.5] * 4


def test_decay_of_groups(text: Path, tmp_path: Path) -> None:
    config, model, task = build(text, tmp_path, **EVERYTHING, train={"weight_decay_groups": ["hidden", "experts"]})
    roles = roles_by_name(model)
    for name, settings in settings_by_name(config, model, task).items():
        decays = roles[name].group in ("hidden", "experts") and roles[name].parameter.dim() >= 2
        assert settings["weight_decay"] == (config.train.weight_decay if decays else 0), name


def test_muon_updates_the_matrices_inside_the_model(text: Path, tmp_path: Path) -> None:
    layout = {"name": "zero_computation", "num_experts": 8, "match": "none", "expert_width": None}
    config, model, task = build(text, tmp_path, layout=layout, router="top_k", train={"optimizer": "muon"})
    optimizer = build_optimizer(config, model, task)
    assert isinstance(optimizer, Muon)
    updated = {name.rpartition("backbone.blocks.0.")[2] for name, s in settings_by_name(config, model, task).items()
               if s["uses_muon"] and ".1." not in name}  # fmt: skip
    # Not the constant experts, whose vectors and mixing gates are no matrices of a network.
    networks = {"feed_forward.bank.groups.0.w_in_EDF", "feed_forward.bank.groups.0.w_out_EFD"}
    assert updated == {"attention.qkv.weight", "attention.out.weight"} | networks


def test_muon_updates_the_matrices_of_whole_models_as_experts(text: Path, tmp_path: Path) -> None:
    layout = {"name": "whole_model", "match": "none", "num_experts": 2, "expert_width": None}
    config, model, task = build(text, tmp_path, layout=layout, router="switch", train={"optimizer": "muon"})
    updated = {name.rpartition(".")[2] for name, s in settings_by_name(config, model, task).items() if s["uses_muon"]}
    assert updated == {"weight", "w_in_DF", "w_out_FD"}
    left = {role.name.split(".")[-2] for role in describe_parameters(model) if not role.uses_muon(config.train)}
    assert left == {"embedding", "head", "gate", "attention_norm", "feed_forward_norm", "norm"}


def test_matrices_of_attention_experts_are_split(text: Path, tmp_path: Path) -> None:
    layout = {"name": "attention", "match": "none", "num_experts": 4, "expert_width": None}
    _, model, _ = build(text, tmp_path, layout=layout, router="top_k")
    (role,) = [
        role for role in describe_parameters(model) if role.name.endswith("blocks.0.attention.layer.bank.weight_EDO")
    ]
    assert role.linear_map is not None
    assert [tuple(part.shape) for part in role.linear_map.split(role.parameter)] == [
        (4, 8, 8)
    ] * 2  # queries; keys that are the values too


def test_a_frozen_router_keeps_its_weights(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="top_k", train={"router_learning_rate": 0.0})
    run = Run(config, tmp_path)
    run()
    trained = run.checkpoint(12)["state_dict"]
    initial = build_initialised_model(config, prepare_task(config, tmp_path)).state_dict()
    for name, value in initial.items():
        assert torch.equal(value, trained[f"model.{name}"]) == (".router." in name), name


LAYOUT = {"name": "every_n", "n": 1, "num_experts": 16, "expert_width": 8}
COMPONENTS: dict[str, dict[str, Any]] = {
    **{f"router {name}": {"router": name, "layout": LAYOUT} for name in ROUTERS.names() if name != "oracle"},
    **{
        f"layout {name}": {"router": "top_k", "layout": {"name": name, "match": "none", "num_experts": 12}}
        for name in LAYOUTS.names()
    },
}


QUICK = {f"router {name}" for name in ("dense", "switch", "soft_moe")} | {*list(COMPONENTS)[::3]}
"""Every third component; all in `make test-all`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMPONENTS]
)
def test_every_component_trains_with_muon_at_a_scaled_width(text: Path, tmp_path: Path, name: str) -> None:
    model_sizes = {"d_model": 16, "num_heads": 4}
    train = {"optimizer": "muon", "mup_base_width": 8}
    config, model, task = build(
        text, tmp_path, **COMPONENTS[name], model=model_sizes, train=train, allow_noncausal=True
    )
    optimizer = build_optimizer(config, model, task)
    batch = task.train_batch(4, 0, 0)
    output, _ = model(batch, batch_context(batch, training=True, seed=0))
    task.loss(output, batch).mean().backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    groups = {role.group for role in describe_parameters(model)}
    assert {"hidden", "embeddings", "head"} <= groups


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_muon_resumes_exactly(text: Path, tmp_path: Path, precision: str) -> None:
    train = {"optimizer": "muon", "accumulate": 2, "precision": precision, "schedule": "wsd", "mup_base_width": 4}
    config = tiny_config(text, router="noisy_top_k", train={**train, "router_learning_rate": 1e-2})
    full, parts = Run(config, tmp_path / "full"), Run(config, tmp_path / "parts")
    assert full() is not None
    assert parts(stop_at=5) is None
    state = parts.checkpoint(5)["optimizer"]
    assert any("bank" in name and name.endswith("momentum_buffer") for name in state)
    assert parts() is not None
    assert_same_runs(full, parts)
