"""A cell as a decoder that transformers may compute, with the reason where it cannot be one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moebench.errors import UsageError
from moebench.experts.assembly import RouterPlan
from moebench.experts.layout import BlockPlan, Experts
from moebench.models.plan import plan_blocks
from moebench.pretrained.decoders.decoder import Decoder, ExpertBlocks
from moebench.pretrained.export.routing_rules import describe_routing
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS

WIDTH_STEP = 8
"""Widths of experts are multiples of this: grouped products of transformers need rows of 16 bytes. Units that are added
have weights of 0."""
Shapes = Mapping[str, Sequence[int]]
"""Name in `Model.state_dict()` -> shape."""


def describe_decoder(config: CellConfig, shapes: Shapes) -> Decoder:
    """Return what a trained model computes in evaluation, its factors folded into its weights (`list_sources`).

    Raises UsageError, which names the key and its value, for what no decoder of transformers computes.
    """
    _require_language_model(config, shapes)
    model, layout = config.model, config.layout
    experts = _describe_experts(config, shapes)
    widths = {shape[0] for name, shape in shapes.items() if name.endswith(".feed_forward.w_out_FD")}
    if len(widths) > 1:
        raise UsageError(f"layout.name={layout.name}: dense networks of several widths")
    has_dense, activation = bool(widths), model.activation
    if experts is not None:
        activation = layout.expert_activation or activation
        if has_dense and activation != model.activation:
            raise UsageError(
                f"layout.expert_activation={activation}: experts and dense networks (model.activation="
                f"{model.activation}) have one activation in transformers"
            )
    scale = embedding_scale(config)
    decoder_model = replace(
        model,
        ffn_width=widths.pop() if has_dense else model.ffn_width,
        activation=activation,
        norm_eps=torch.finfo(torch.float32).eps if model.norm_eps is None else model.norm_eps,
        tie_embeddings=model.tie_embeddings and scale == 1,
        embedding_scale=1.0,
        residual_scale=1.0,
    )
    return Decoder(model=decoder_model, vocab_size=shapes["embedding.weight"][0], experts=experts)


def embedding_scale(config: CellConfig) -> float:
    """Return the factor on embedded inputs; see `ModelConfig.embedding_scale`."""
    model = config.model
    if model.embedding_scale is not None:
        return model.embedding_scale
    return float(model.d_model**0.5) if model.tie_embeddings else 1.0


def list_sources(config: CellConfig, decoder: Decoder) -> dict[str, tuple[str, float]]:
    """Return the weights that differ from those of the run: name -> the weight that it is, and a factor on it.

    A factor on embedded inputs is in their table, which a head then cannot share; the factor of the residual stream and
    a factor of softmax weights are in the output projections.
    """
    sources: dict[str, tuple[str, float]] = {}
    scale = embedding_scale(config)
    if scale != 1:
        sources["embedding.weight"] = "embedding.weight", scale
    if config.model.tie_embeddings and not decoder.model.tie_embeddings:
        sources["head.weight"] = "embedding.weight", 1.0
    residual = config.model.residual_scale
    routed = residual
    if decoder.experts is not None and decoder.experts.routing.score == "softmax":
        routed *= decoder.experts.routing.scale
    factors = {
        **dict.fromkeys(("attention.out.weight", "attention.out.bias"), residual),
        **dict.fromkeys(("feed_forward.w_out_FD", "feed_forward.b_out_D", "feed_forward.shared.w_out_FD"), residual),
        "feed_forward.bank.w_out_EFD": routed,
    }
    for block in range(decoder.model.num_layers):
        for ending, factor in factors.items():
            name = f"backbone.blocks.{block}.{ending}"
            if factor != 1:
                sources[name] = name, factor
    return sources


def _require_language_model(config: CellConfig, shapes: Shapes) -> None:
    facts, model = TASKS.get(config.task.name).facts, config.model
    if not facts.causal or facts.output != "tokens" or facts.is_encoder_decoder:
        raise UsageError(f"task.name={config.task.name}: only causal language models are written for it")
    head = shapes["embedding.weight" if model.tie_embeddings else "head.weight"]
    if list(head) != list(shapes["embedding.weight"]) or "head.bias" in shapes:
        raise UsageError(f"task.name={config.task.name}: its inputs and outputs are not the same ids")
    if model.norm != "rmsnorm":
        raise UsageError(f"model.norm={model.norm}: these decoders of transformers have RMSNorm")


def _describe_experts(config: CellConfig, shapes: Shapes) -> ExpertBlocks | None:
    plans = plan_blocks(config)
    blocks = [block for block, plan in enumerate(plans) if plan.banks]
    if not blocks:
        return None
    layout = config.layout
    if layout.capacity_factor_eval is not None:
        raise UsageError(
            f"layout.capacity_factor_eval={layout.capacity_factor_eval:g}: in transformers no expert has a capacity"
        )
    bank = _require_plain_bank([plans[block] for block in blocks], layout.name)
    names = [f"backbone.blocks.{block}.feed_forward" for block in blocks]
    banks = {(*shapes[f"{name}.bank.w_out_EFD"][:2], *_shared_width(name, shapes)) for name in names}
    if len(banks) > 1:
        raise UsageError(f"layout.name={layout.name}: blocks with experts of several numbers and widths")
    num_experts, width, shared_width = banks.pop()
    width = _round_up(width, WIDTH_STEP)
    return ExpertBlocks(
        blocks=tuple(blocks),
        num_experts=num_experts,
        width=width,
        shared_width=_round_up(shared_width, width),
        routing=describe_routing(RouterPlan.of(config.router, bank).config),
    )


def _require_plain_bank(plans: Sequence[BlockPlan], layout: str) -> Experts:
    """Return the plan of the experts of a block; raise UsageError for others than networks side by side."""
    for plan in plans:
        bank = plan.feed_forward
        if bank is None or plan.attention or plan.stack:
            raise UsageError(f"layout.name={layout}: experts in other places than the feed-forward part")
        shape = bank.shapes[0]
        if set(bank.shapes) != {shape} or shape.kind != "ffn":
            raise UsageError(f"layout.name={layout}: experts that differ")
        if shape.depth != 1:
            raise UsageError(f"layout.depth={shape.depth}: an expert of transformers is one network")
        if bank.residual:
            raise UsageError(f"layout.name={layout}: a gate weights the routed against the shared experts")
        if bank.groups != 1:
            raise UsageError(f"layout.name={layout}: groups of experts with a router each")
    assert plans[0].feed_forward is not None
    return plans[0].feed_forward


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _shared_width(name: str, shapes: Shapes) -> tuple[int]:
    shared = shapes.get(f"{name}.shared.w_out_FD")
    return (shared[0] if shared else 0,)
