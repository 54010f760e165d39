"""Small models of every layout with every router, for the contract tests."""

from collections.abc import Mapping
from typing import Any

import torch
from support.cases import VOCAB
from torch import Tensor

from moebench.config import resolve
from moebench.experts.layout import LAYOUTS
from moebench.models.build import build_backbone
from moebench.models.transformer import BatchContext, Transformer, init_weights
from moebench.routing.context import DataSummary
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.features.token_pairs import TokenPairs
from moebench.routing.router import ROUTERS

D_MODEL, LENGTH, BATCH = 16, 16, 2
SIZES = {"d_model": D_MODEL, "num_layers": 2, "num_heads": 2, "ffn_width": 512}


def config_of(layout: str, router: Any = "top_k", model: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return the configuration of a small model with 8 experts in each bank."""
    return resolve(
        {
            "router": router,
            "layout": {"name": layout, "num_experts": 8, **options},
            "model": {**SIZES, **(model or {})},
        }
    )


def backbone_of(config: Any, *, causal: bool = True, seed: int = 0, sequence_length: int = LENGTH) -> Transformer:
    """Build and initialise a backbone."""
    token_count_V = (1000 / torch.arange(1, VOCAB + 1)).long()
    backbone = build_backbone(
        config,
        causal=causal,
        data=DataSummary(vocab_size=VOCAB, token_count_V=token_count_V, sequence_length=sequence_length, num_domains=2),
        features={TokenPairs: torch.randint(100, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0))},
    )
    init_weights(backbone, seed)
    return backbone


def batch(*, training: bool, seed: int = 0, size: int = BATCH, length: int = LENGTH) -> tuple[Tensor, BatchContext]:
    """Return vectors and the context of a batch."""
    generator = torch.Generator().manual_seed(seed)
    x_BLD = torch.randn(size, length, D_MODEL, generator=generator)
    token_id_BL = torch.randint(VOCAB, (size, length), generator=generator)
    domain_B = torch.arange(size) % 2
    return x_BLD, BatchContext(
        training=training,
        seed=seed,
        token_id_BL=token_id_BL,
        domain_B=domain_B,
        features={TokenLabels: token_id_BL.flatten() % 5},
    )


UNLIKE = (
    *("attention", "moduleformer", "whole_model", "hierarchical", "prototypes"),
    *("heterogeneous", "zero_computation"),
)
"""Layouts whose experts are not feed-forward networks of one shape behind one router."""


def may_refuse(layout: str, router: str) -> str:
    """Return why a layout may refuse a router with its default options; empty: it must accept the router.

    fine_grained needs a number of experts per token that can be multiplied; two levels and prototypes divide the
    experts, and some routers want more than a group has; soft routing does not say where a token goes, which
    attention experts, whole models and groups need; a chain of experts needs one group of networks.
    """
    router_class = ROUTERS.get(router).item
    config = router_class.Config()
    if router_class.form.is_merged and layout in UNLIKE:
        return "sums the parameters of experts"
    if router_class.form.is_mixture and layout in (
        "attention",
        "moduleformer",
        "whole_model",
        "hierarchical",
        "prototypes",
    ):
        return "mixes tokens into slots"
    if router_class.form.is_chain and layout in (
        "attention",
        "moduleformer",
        "whole_model",
        "hierarchical",
        "prototypes",
    ):
        return "one expert after another|layout.groups"
    if layout == "fine_grained" and router == "multi_gate":
        return "is not divisible among"  # all of 32 experts of width 16, and their gates for each domain
    if layout == "fine_grained":
        grows = router_class.experts_per_token(config, 8) == 8 or {"top_k", "average_experts"} & set(vars(config))
        return "" if grows or router_class.form.is_dense else "fixed at"
    if layout in ("hierarchical", "prototypes"):
        try:
            groups = LAYOUTS.get(layout).item.Config().groups
            for size in {8 // groups, groups} if layout == "hierarchical" else {8 // groups}:
                router_class.check(config, size)
        except Exception:
            return "layout.groups"
    return ""
