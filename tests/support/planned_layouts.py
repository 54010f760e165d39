"""Models of four blocks of width 8 with a given layout, whose widths and costs tests work out by hand."""

from typing import Any

import torch

from moebench.config import resolve
from moebench.models.build import build_backbone
from moebench.models.cost import Cost, compute_cost
from moebench.models.transformer import Transformer
from moebench.routing.context import DataSummary


def config_of(layout: dict[str, Any], router: Any = "switch", **model: Any) -> Any:
    """Return the configuration of a model with this layout; `model` replaces its sizes."""
    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 4, "ffn_width": 64}
    return resolve({"router": router, "layout": layout, "model": sizes | model})


def backbone_of(layout: dict[str, Any], router: Any = "switch", **model: Any) -> Transformer:
    """Build its blocks, for a vocabulary of 20 tokens and sequences of 10."""
    config = config_of(layout, router, **model)
    return build_backbone(
        config, causal=True, data=DataSummary(token_count_V=torch.arange(20, 0, -1), sequence_length=10)
    )


def cost(layout: dict[str, Any], router: Any = "switch", **model: Any) -> Cost:
    """Return what its blocks cost in sequences of 10."""
    return compute_cost(backbone_of(layout, router, **model), [], 10)
