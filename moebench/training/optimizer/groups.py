"""What each parameter of a model is, and the parameter groups of the optimizer that follow from it.

Parameters are told apart by the module that they belong to and by the maps that modules state (`LinearMap`), not by
their names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from moebench.experts.layer import MoELayer
from moebench.optimizer_config import ParameterGroup
from moebench.parallel.expert_sharding import iter_sharded_banks
from moebench.routing.linear_map import LinearMap, find_linear_maps
from moebench.schema import TrainConfig

if TYPE_CHECKING:  # which imports this package to initialise models
    from moebench.training.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterRole:
    """What a parameter is in its model."""

    name: str
    parameter: nn.Parameter
    group: ParameterGroup
    linear_map: LinearMap | None
    """None: no module states one."""
    is_vector: bool
    """A bias or gain, or a stack of them: not decayed."""
    is_in_stack: bool
    """Whether it belongs to experts that are networks, which are sharded over processes."""

    def uses_muon(self, train: TrainConfig) -> bool:
        """Return whether Muon updates the parameter: a matrix inside the model that is no gate and no table."""
        if train.optimizer != "muon" or self.group not in ("hidden", "experts") or self.linear_map is None:
            return False
        return self.linear_map.in_dim is not None and not self.linear_map.is_gate

    def learning_rate(self, train: TrainConfig) -> float:
        """Return the peak learning rate at the base width."""
        rates: Mapping[ParameterGroup, float | None] = {
            "experts": train.expert_learning_rate,
            "router": train.router_learning_rate,
            "embeddings": train.embedding_learning_rate,
            "head": train.head_learning_rate,
        }
        rate = rates.get(self.group)
        if rate is None and self.uses_muon(train):
            rate = train.muon_learning_rate
        return train.learning_rate if rate is None else rate

    def weight_decay(self, train: TrainConfig) -> float:
        """Return the weight decay at the base width."""
        return 0.0 if self.is_vector or self.group not in train.weight_decay_groups else train.weight_decay


def describe_parameters(model: "Model") -> list[ParameterRole]:
    """Return the role of every parameter of a model, in the order of `named_parameters`."""
    maps, vectors = find_linear_maps(model)
    groups: dict[int, ParameterGroup] = {}
    for module, group in _iter_owners(model):
        for parameter in module.parameters():
            groups.setdefault(id(parameter), group)  # an output that shares the embedding is an embedding
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    stacks = {id(p) for layer in layers for bank in iter_sharded_banks(layer.bank) for p in bank.parameters()}
    return [
        ParameterRole(
            name=name,
            parameter=parameter,
            group=groups.get(id(parameter), "hidden"),
            linear_map=maps.get(id(parameter)),
            is_vector=parameter.dim() < 2 or id(parameter) in vectors,
            is_in_stack=id(parameter) in stacks,
        )
        for name, parameter in model.named_parameters()
    ]


def _iter_owners(model: "Model") -> Iterator[tuple[nn.Module, ParameterGroup]]:
    """Yield the modules whose parameters are not hidden ones; of two that share a parameter the first has it."""
    yield model.embedding, "embeddings"
    for feature in model.features:
        module = model.feature_module(feature)
        if module is not None:
            yield module, "router"
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            yield layer.router, "router"
            yield layer.bank, "experts"
            if layer.mix is not None:
                yield layer.mix, "router"
    yield model.head, "head"


@dataclass(frozen=True, kw_only=True)
class WidthFactors:
    """What a parameter's settings are multiplied by in a model that is wider than its base; 1: as they are."""

    learning_rate: float = 1.0
    initial_scale: float = 1.0


UNSCALED = WidthFactors()


def group_parameters(
    roles: Sequence[ParameterRole], train: TrainConfig, factors: Mapping[str, WidthFactors]
) -> list[dict[str, Any]]:
    """Return parameter groups with `lr` and `weight_decay`; with Muon also with `uses_muon`.

    Stacks of experts are groups of their own, sharded or not: the fused update takes one kind of tensor.

    `factors`: of parameters that are scaled with the width, by name.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    is_restricted = train.trainable != "all"
    for role in roles:
        if is_restricted and not role.parameter.requires_grad:
            continue
        factor = factors.get(role.name, UNSCALED).learning_rate
        settings: dict[str, Any] = {
            "lr": role.learning_rate(train) * factor,
            "weight_decay": role.weight_decay(train) / factor,
        }
        if train.optimizer == "muon":
            settings["uses_muon"] = role.uses_muon(train)
        key = (*settings.values(), role.is_in_stack)
        groups.setdefault(key, {"params": [], **settings})["params"].append(role.parameter)
    return list(groups.values())
