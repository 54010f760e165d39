"""Scaling with width (muP, arXiv:2203.03466, table 3): initial weights and learning rates relative to a base width.

Which dimensions grow with the width is found by comparing each parameter with that of the base model, which has the
same configuration with all widths divided by the ratio r. How a weight is scaled follows from whether its input, its
output or both grow; the base model itself is not scaled. `TrainConfig` has the formulas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moebench.errors import UsageError
from moebench.schema import CellConfig, TrainConfig
from moebench.training.optimizer.groups import ParameterRole, WidthFactors
from moebench.training.optimizer.muon import SCALINGS

SHRUNK = ("d_model", "num_heads", "num_kv_heads", "ffn_width")
"""Options of `model` that are proportional to the width; heads keep theirs."""


def shrink_widths(config: CellConfig) -> CellConfig:
    """Return the configuration of the base model, whose widths are those of `config` divided by the ratio."""
    model, base_width = config.model, config.train.mup_base_width
    assert base_width is not None

    def shrink(width: int) -> int:
        return max(1, round(width * base_width / model.d_model))

    sizes: dict[str, Any] = {name: shrink(getattr(model, name)) for name in SHRUNK if getattr(model, name, None)}
    if "num_kv_heads" in sizes:
        sizes["num_kv_heads"] = math.gcd(sizes["num_kv_heads"], sizes["num_heads"])
    expert_width = config.layout.expert_width
    layout = replace(config.layout, expert_width=None if expert_width is None else shrink(expert_width))
    return replace(config, model=replace(model, **sizes), layout=layout)


def compute_width_factors(
    config: CellConfig, roles: Sequence[ParameterRole], base: nn.Module | None
) -> dict[str, WidthFactors]:
    """Return the factors of all parameters by name; empty without `base`, the base model: no width scaling."""
    if base is None:
        return {}
    ratio = config.model.d_model / (config.train.mup_base_width or config.model.d_model)
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    factors = {}
    for role in roles:
        growing = [a != b for a, b in zip(role.parameter.shape, shapes[role.name], strict=True)]
        factors[role.name] = _scale_role(role, growing, ratio, config.train)
    return factors


def _scale_role(role: ParameterRole, growing: Sequence[bool], ratio: float, train: TrainConfig) -> WidthFactors:
    """Return the factors of a parameter; `growing`: whether each of its dimensions grows with the width."""
    if role.is_vector:
        return WidthFactors()
    if role.linear_map is None:  # gates of routers that state no maps read the token's vector; tables are not read
        input_grows, output_grows = role.group == "router" and any(growing), sum(growing) > 1
    else:
        in_dim, out_dim = role.linear_map.in_dim, role.linear_map.out_dim
        input_grows, output_grows = in_dim is not None and growing[in_dim], growing[out_dim]
    initial_scale = ratio**-0.5 if input_grows and not output_grows else 1.0
    if role.uses_muon(train):
        rate = _scale_muon(role, train.muon_scaling, ratio if input_grows else 1, ratio if output_grows else 1)
    else:
        rate = 1 / ratio if input_grows else 1.0
    return WidthFactors(learning_rate=rate, initial_scale=initial_scale)


def _scale_muon(role: ParameterRole, scaling: str, input_ratio: float, output_ratio: float) -> float:
    """Return the factor that gives the update of a matrix the spectral norm sqrt(n_out / n_in) times a constant."""
    assert role.linear_map is not None
    n_out, n_in = role.linear_map.split(role.parameter)[0].shape[-2:]
    scale, base_scale = SCALINGS[scaling](n_out, n_in), SCALINGS[scaling](n_out / output_ratio, n_in / input_ratio)
    return math.sqrt(output_ratio / input_ratio) * base_scale / scale


@torch.no_grad()
def scale_initial_weights(roles: Sequence[ParameterRole], factors: Mapping[str, WidthFactors]) -> None:
    """Multiply the weights, which have just been initialised, by their factors."""
    for role in roles:
        scale = factors[role.name].initial_scale if role.name in factors else 1.0
        if scale != 1:
            role.parameter.mul_(scale)


def refuse_shared_embedding(head: nn.Module, embedding: nn.Module) -> None:
    """Raise UsageError where the output shares a parameter with the embedding: its two uses need different factors."""
    if {id(parameter) for parameter in head.parameters()} & {id(parameter) for parameter in embedding.parameters()}:
        raise UsageError(
            "train.mup_base_width must be null where the output shares the embedding: the same weights would need"
            " different learning rates as input and as output"
        )
