"""The MoE layer for models outside moebench: built from options, called like any `nn.Module`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moebench.config import resolve, to_plain
from moebench.errors import UsageError, build_unknown_error, require
from moebench.experts.layer import MoELayer
from moebench.experts.layout import LayoutConfig
from moebench.models.build import build_backbone
from moebench.models.plan import plan_blocks
from moebench.models.transformer import init_weights
from moebench.routing.context import DataSummary, RouteContext
from moebench.routing.features.consistency import Consistency
from moebench.routing.features.padding_mask import PaddingMask
from moebench.routing.features.shared_embedding import SharedEmbedding
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.layer_losses import compute_raw_losses
from moebench.routing.router import ROUTERS, Router, required_features
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.seeds import make_generator

MODEL_OPTIONS = ("ffn_width", "activation", "ffn_bias")
"""Keys of `layout` that describe the dense network which the layer replaces."""
MODEL_FEATURES = (Consistency, SharedEmbedding, TokenLabels)
"""Context features that only a whole model or a task supplies."""
DATA_KEYS = ("vocab_size", "token_count", "num_domains", "sequence_length")


@dataclass(frozen=True, kw_only=True, eq=False)
class MoERecord(LayerRecord):
    """The record of one forward pass, with what is needed to compute the router's auxiliary losses."""

    router: Router
    coefficients: Mapping[str, float]
    """Coefficient of each auxiliary loss, as configured."""

    @property
    def raw_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses before their coefficient, by name."""
        return compute_raw_losses(self.router, self, self.coefficients)


class MoE(nn.Module):
    """A router, its experts and their capacity behind one call; `moe_layer` builds it.

    Nothing is stored during `forward`. The mode of the module (`train()`, `eval()`) decides whether the router adds
    noise and which capacity factor applies.
    """

    def __init__(self, layer: MoELayer, config: CellConfig, data: DataSummary, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_model = config.model.d_model
        self.coefficients: Mapping[str, float] = config.router.losses
        self.vocab_size: int | None = data.vocab_size
        self.num_domains: int | None = data.num_domains
        self.seed = seed

    def forward(
        self,
        x: Tensor,
        *,
        step: int | None = None,
        token_ids: Tensor | None = None,
        domain_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MoERecord]:
        """Return y, shaped like `x`, and the record of what was routed where.

        `x`: (B, L, D), or (T, D) for one sequence of T tokens. `step`: number of the optimizer step, required in
        training mode; routing noise is a function of the seed and the step, so a resumed run draws the same.
        `token_ids`: int64, (B, L) or (T,). `domain_ids`: int64, one per sequence or per token. Both are ignored unless
        the layer was built with `data` that describes them. `mask`: bool, False at padding, (B, L) or (T,). Raises
        UsageError for another shape and for a missing input.
        """
        self._check_vectors(x)
        shape = tuple(x.shape)
        if self.training and step is None:
            raise UsageError("step: required in training mode, got None (the number of the optimizer step)")
        token_ids = _check_ids("token_ids", token_ids, self.vocab_size)
        # in evaluation, larger ids are domains that were held out of training
        domain_ids = _check_ids("domain_ids", domain_ids, self.num_domains, has_maximum=self.training)
        require(mask is None or mask.dtype == torch.bool, "mask", getattr(mask, "dtype", None), "torch.bool")
        purpose = ("router", step) if self.training else ("router in evaluation",)
        valid_T = _per_token("mask", mask, shape[:-1])
        ctx = RouteContext(
            training=self.training,
            generator=make_generator(self.seed, *purpose, device=x.device),
            sequence_length=shape[-2],
            token_id_T=_per_token("token_ids", token_ids, shape[:-1]),
            valid_T=valid_T,
            domain_T=_per_token("domain_ids", domain_ids, shape[:-1]),
            step=step or 0,
            features={} if valid_T is None else {PaddingMask: valid_T},
        )
        y_TD, record = self.layer(x.reshape(-1, self.d_model), ctx)
        values = {field.name: getattr(record, field.name) for field in fields(LayerRecord)}
        return y_TD.view_as(x), MoERecord(**values, router=self.layer.router, coefficients=self.coefficients)

    def _check_vectors(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise UsageError(f"x must be a tensor, got {type(x).__name__}")
        shape = tuple(x.shape)
        require(x.dim() in (2, 3) and shape[-1] == self.d_model, "x", shape, f"(B, L, {self.d_model}) or (T, ...)")
        dtypes = {parameter.dtype for parameter in self.layer.bank.parameters() if parameter.is_floating_point()}
        if not torch.is_autocast_enabled(x.device.type) and dtypes and x.dtype not in dtypes:
            raise UsageError(
                f"x must be {' or '.join(map(str, dtypes))} as the experts are, or be used within torch.autocast,"
                f" got {x.dtype}"
            )

    def after_step(self, records: LayerRecord | Sequence[LayerRecord]) -> None:
        """Update the router's state, such as a selection bias: call it once after each optimizer step.

        `records`: those of the step's forward passes, one for each micro-batch. Routers without state ignore it.
        """
        self.layer.after_step([records] if isinstance(records, LayerRecord) else records)

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs of one token as planned, 2 for a multiplication and an addition."""
        return self.layer.flops_per_token()


def moe_layer(
    d_model: int,
    num_experts: int,
    router: str | Mapping[str, Any] = "top_k",
    layout: LayoutConfig | Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int | torch.Generator = 0,
) -> MoE:
    """Build an MoE layer with initialised weights.

    `router`: a name, or a mapping of a name and options (`{"name": "top_k", "top_k": 4}`). `layout`: options of an
    expert layout, such as `name`, `expert_width`, `capacity_factor_train`, `shared`; and `ffn_width` (default
    4 · d_model), `activation` ("gelu" or "swiglu") and `ffn_bias` of the dense network that the layer replaces. Unless
    `expert_width` is given, experts are as wide as makes router and active experts cost the FLOPs per token of that
    network. `data`: facts about the data that some routers need when they are built: `vocab_size`, `token_count` (int64
    [V], how often each id occurs), `num_domains`, `sequence_length`; ids are then arguments of each call. `seed`: of
    the weights and the routing noise; a generator gives every layer of a model its own seed. Raises UsageError for
    incompatible options, and for routers that need a whole model or task.
    """
    config = _resolve(d_model, num_experts, router, layout)
    _refuse_incomplete(config)
    summary = _summarise(data)
    backbone = build_backbone(config, causal=False, data=summary)
    [layer] = backbone.moe_layers()
    seed = int(torch.randint(2**31, (), generator=seed)) if isinstance(seed, torch.Generator) else seed
    module = MoE(layer, config, summary, seed)
    init_weights(module, seed)
    return module


def _summarise(data: Mapping[str, Any] | None) -> DataSummary:
    """Return what routers know of the data; raise UsageError for an unknown key or a value that is no count."""
    if not isinstance(data, Mapping | None):
        raise UsageError(f"data must be a mapping, got {data!r}")
    values = dict(data or {})
    for key, value in values.items():
        if key not in DATA_KEYS:
            raise build_unknown_error("data", key, DATA_KEYS)
        if key != "token_count":
            require(type(value) is int and value > 0, f"data.{key}", repr(value), "a whole number above 0")
    count_V = values.get("token_count")
    if count_V is None and "vocab_size" in values:
        count_V = torch.ones(values["vocab_size"], dtype=torch.int64)
    if count_V is not None:
        count_V = torch.as_tensor(count_V)
        require(count_V.dim() == 1 and len(count_V) > 0, "data.token_count", tuple(count_V.shape), "(V,)")
        vocab_size = values.get("vocab_size", len(count_V))
        require(vocab_size == len(count_V), "data.vocab_size", vocab_size, f"{len(count_V)}, as token_count is long")
        values["vocab_size"] = vocab_size
    return DataSummary(
        vocab_size=values.get("vocab_size"),
        token_count_V=count_V,
        sequence_length=values.get("sequence_length"),
        num_domains=values.get("num_domains"),
    )


def balance_loss(records: MoERecord | Sequence[MoERecord]) -> Tensor:
    """Return the sum of the router's auxiliary losses, each times its configured coefficient: a scalar.

    Of several layers it is the mean over layers, as in moebench's own training. 0 for a router without losses.
    """
    records = [records] if isinstance(records, LayerRecord) else records
    if not records or not all(isinstance(record, MoERecord) for record in records):
        given = "no record" if not records else type(records).__name__
        raise UsageError(f"balance_loss: got {given} (allowed: one record, or a list of one for each layer)")
    return torch.stack([_sum_weighted_losses(record) for record in records]).mean()


def _sum_weighted_losses(record: MoERecord) -> Tensor:
    zero = torch.zeros((), device=record.routing.load_E.device)
    return sum((record.coefficients[name] * loss for name, loss in record.raw_losses.items()), start=zero)


def _resolve(
    d_model: int,
    num_experts: int,
    router: str | Mapping[str, Any],
    layout: LayoutConfig | Mapping[str, Any] | None,
) -> CellConfig:
    """Return the configuration of a model of one block, which holds the layer."""
    is_even = isinstance(d_model, int) and d_model > 0 and d_model % 2 == 0
    require(is_even, "d_model", repr(d_model), "an even number above 0")
    if not isinstance(layout, LayoutConfig | Mapping | None):
        raise UsageError(f"layout must be a mapping of options or a LayoutConfig, got {layout!r}")
    options = to_plain(layout) if isinstance(layout, LayoutConfig) else dict(layout or {})
    model = {"d_model": d_model, "num_layers": 1, "num_heads": 1, "ffn_width": 4 * d_model}
    model |= {key: options.pop(key) for key in MODEL_OPTIONS if key in options}
    options["num_experts"] = num_experts
    if options.setdefault("name", "every_n") == "every_n":
        options["n"] = 1
    if isinstance(router, Mapping) and "name" not in router:
        raise UsageError(f"router: needs a name, got {dict(router)} (for example {{'name': 'top_k', 'top_k': 4}})")
    return resolve({"model": model, "layout": options, "router": router})


def _refuse_incomplete(config: CellConfig) -> None:
    """Raise UsageError for layouts and routers that are more than a layer between vectors."""
    name, entry = config.router.name, ROUTERS.get(config.router.name, where="router.name")
    router_class = entry.item
    if router_class.form.is_dense:
        raise UsageError(f"router.name: '{name}' has no experts (allowed: any other router)")
    plan = plan_blocks(config)
    if any(block.attention or block.stack or not block.feed_forward for block in plan):
        raise UsageError(f"layout.name: '{config.layout.name}' has experts outside the feed-forward part")
    is_reinforced = router_class.objective is not Router.objective or entry.facts.family == "reinforcement"
    unavailable = [f.description for f in required_features(config.router) if isinstance(f, MODEL_FEATURES)]
    if is_reinforced:
        unavailable.append("the task's loss of each token")
    if unavailable:
        raise UsageError(f"router.name: '{name}' needs {unavailable[0]}; train it by `moebench run`")


def _check_ids(name: str, ids: Tensor | None, num_ids: int | None, *, has_maximum: bool = True) -> Tensor | None:
    """Return the ids, or None where the layer was built without `data` that describes them."""
    if num_ids is None:
        return None
    if ids is None:
        raise UsageError(f"{name}: required, because the layer was built with `data` that describes them")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(f"{name} must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.numel() and ids.device.type == "cpu":  # on another device the check would wait for it
        smallest, largest = int(ids.min()), int(ids.max())
        is_valid = smallest >= 0 and (largest < num_ids or not has_maximum)
        require(is_valid, name, f"{smallest} to {largest}", f"0 to {num_ids - 1}" if has_maximum else "0 or more")
    return ids.long()


def _per_token(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return one value per token, [T], from one per token or one per sequence."""
    if value is None:
        return None
    if value.shape == shape:
        return value.reshape(-1)
    require(name == "domain_ids" and value.shape == shape[:1], name, tuple(value.shape), str(shape))
    return value.repeat_interleave(shape[1])
