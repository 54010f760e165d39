"""An architecture of transformers that moebench can compute: configuration and weights, in both directions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moebench.model_config import ModelConfig
from moebench.pretrained.decoders.config_keys import Choice, ConfigKeys, Entries
from moebench.pretrained.decoders.decoder import Decoder
from moebench.pretrained.decoders.expert_format import ExpertFormat, Shape, map_network
from moebench.pretrained.decoders.rotary import read_rotary, write_rotary
from moebench.pretrained.decoders.weight_map import WeightMap, map_one

SWIGLU: Choice[str] = {"swiglu": {"hidden_act": "silu"}}
GELU: Choice[str] = {"gelu": {"hidden_act": "gelu"}}
MAX_LAYERS = 1000
"""That of `model.num_layers`."""
WITHOUT: Choice[str] = {"none": {}}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with pre-norm RMSNorm, rotary attention over whole heads, and networks without or with experts."""

    model_type: str
    """In config.json."""
    class_name: str
    """Of transformers."""
    activation: Choice[str] = field(default_factory=lambda: SWIGLU)
    attention_bias: Choice[str]
    """Values of `model.attention_bias`."""
    qk_norm: Choice[str] = field(default_factory=lambda: WITHOUT)
    """Values of `model.qk_norm`."""
    ffn_bias: Choice[bool] = field(default_factory=lambda: {False: {}})
    """Values of `model.ffn_bias`."""
    fixed: Entries = field(default_factory=dict)
    """Keys with the only value that moebench computes."""
    experts: ExpertFormat | None = None

    def read(self, config: ConfigKeys) -> Decoder:
        """Return the model of a configuration; raise UsageError for what moebench does not compute."""
        num_layers = config.number("num_hidden_layers", MAX_LAYERS)
        d_model, heads = config.number("hidden_size"), config.number("num_attention_heads")
        norm_eps = config.values.get("rms_norm_eps")
        head_width = config.values.get("head_dim")
        if head_width not in (None, d_model / heads):
            raise config.refuse("head_dim", f"hidden_size / num_attention_heads = {d_model / heads:g}")
        config.require(self.fixed)
        experts = self.experts.read(config, num_layers) if self.experts else None
        is_sparse = experts is not None and len(experts.blocks) == num_layers
        ffn_width = (
            experts.routing.top_k * experts.width if experts and is_sparse else config.number("intermediate_size")
        )
        model = ModelConfig(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=config.number("num_key_value_heads"),
            ffn_width=ffn_width,
            activation=config.choose(self.activation, "the activation of this architecture"),  # type: ignore[arg-type]
            attention_bias=config.choose(self.attention_bias, "biases of attention"),  # type: ignore[arg-type]
            ffn_bias=config.choose(self.ffn_bias, "biases of networks"),
            norm_eps=None if norm_eps == torch.finfo(torch.float32).eps else norm_eps,
            qk_norm=config.choose(self.qk_norm, "norms of queries and keys"),  # type: ignore[arg-type]
            tie_embeddings=bool(config.values.get("tie_word_embeddings")),
            embedding_scale=1.0,
            **read_rotary(config),
        )
        return Decoder(model=model, vocab_size=config.number("vocab_size"), experts=experts)

    def find_problem(self, decoder: Decoder) -> str | None:
        """Return why this architecture cannot compute a model; None where it can."""
        model, experts = decoder.model, decoder.experts
        for key in ("activation", "attention_bias", "qk_norm", "ffn_bias"):
            if getattr(model, key) not in getattr(self, key):
                return f"model.{key} is {getattr(model, key)}"
        if experts is None:
            return "it has no experts" if self.experts else None
        return "it has experts" if self.experts is None else self.experts.find_problem(experts, model.num_layers)

    def write(self, decoder: Decoder) -> dict[str, Any]:
        """Return config.json for a model that has no problem."""
        model, experts = decoder.model, decoder.experts
        entries = {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "vocab_size": decoder.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads or model.num_heads,
            "head_dim": model.d_model // model.num_heads,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "rope_parameters": {**write_rotary(model), "partial_rotary_factor": 1.0},
            **self.activation[model.activation],
            **self.attention_bias[model.attention_bias],
            **self.qk_norm[model.qk_norm],
            **self.ffn_bias[model.ffn_bias],
            **self.fixed,
        }
        return entries | (self.experts.write(experts, model.num_layers) if self.experts and experts else {})

    def map_weights(self, decoder: Decoder) -> Iterator[WeightMap]:
        """Yield every weight of a model."""
        model, d_model = decoder.model, decoder.model.d_model
        table = decoder.vocab_size, d_model
        yield map_one("embedding.weight", ("model.embed_tokens.weight", table))
        for block in range(model.num_layers):
            ours, theirs = f"backbone.blocks.{block}", f"model.layers.{block}"
            yield map_one(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight", (d_model,)))
            yield from _map_attention(f"{ours}.attention", f"{theirs}.self_attn", model)
            yield map_one(f"{ours}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight", (d_model,)))
            if self.experts and block in decoder.expert_blocks:
                yield from self.experts.map_weights(f"{ours}.feed_forward", theirs, decoder)
            else:
                yield from _map_dense(f"{ours}.feed_forward", f"{theirs}.mlp", model)
        yield map_one("backbone.norm.weight", ("model.norm.weight", (d_model,)))
        if not model.tie_embeddings:
            yield map_one("head.weight", ("lm_head.weight", table))

    def list_gates(self, decoder: Decoder) -> tuple[str, ...]:
        """Return the weights that must be 0: gates of shared experts, where there are any."""
        if self.experts is None or decoder.experts is None or not decoder.experts.shared_width:
            return ()
        names = (self.experts.name_gate(f"model.layers.{block}") for block in decoder.expert_blocks)
        return tuple(name for name in names if name)

    def list_empty(self, decoder: Decoder) -> dict[str, Shape]:
        """Return the weights of the architecture that ours does not have, of no size or 0: name -> shape."""
        empty: dict[str, Shape] = {}
        for block in decoder.expert_blocks if self.experts else ():
            empty |= self.experts.list_empty(f"model.layers.{block}", decoder) if self.experts else {}
        return empty


def _map_attention(ours: str, theirs: str, model: ModelConfig) -> Iterator[WeightMap]:
    d_model, head_width = model.d_model, model.d_model // model.num_heads
    kv_width = (model.num_kv_heads or model.num_heads) * head_width
    widths = {"q_proj": d_model, "k_proj": kv_width, "v_proj": kv_width}
    yield map_one(
        f"{ours}.qkv.weight", *((f"{theirs}.{name}.weight", (rows, d_model)) for name, rows in widths.items())
    )
    yield map_one(f"{ours}.out.weight", (f"{theirs}.o_proj.weight", (d_model, d_model)))
    if model.attention_bias != "none":
        yield map_one(f"{ours}.qkv.bias", *((f"{theirs}.{name}.bias", (rows,)) for name, rows in widths.items()))
    if model.attention_bias == "all":
        yield map_one(f"{ours}.out.bias", (f"{theirs}.o_proj.bias", (d_model,)))
    if model.qk_norm != "none":
        query, key = (head_width, head_width) if model.qk_norm == "head" else (d_model, kv_width)
        yield map_one(f"{ours}.qk_norm.query.weight", (f"{theirs}.q_norm.weight", (query,)))
        yield map_one(f"{ours}.qk_norm.key.weight", (f"{theirs}.k_norm.weight", (key,)))


def _map_dense(ours: str, theirs: str, model: ModelConfig) -> Iterator[WeightMap]:
    d_model, width = model.d_model, model.ffn_width
    inputs: tuple[Literal["gate_proj", "up_proj"], ...] = ("gate_proj", "up_proj")
    if model.activation == "swiglu":
        yield from map_network(ours, theirs, d_model, width)
    else:
        inputs = ("up_proj",)
        yield map_one(f"{ours}.w_in_DF", (f"{theirs}.up_proj.weight", (width, d_model)), is_transposed=True)
        yield map_one(f"{ours}.w_out_FD", (f"{theirs}.down_proj.weight", (d_model, width)), is_transposed=True)
    if model.ffn_bias:
        yield map_one(f"{ours}.b_in_F", *((f"{theirs}.{name}.bias", (width,)) for name in inputs))
        yield map_one(f"{ours}.b_out_D", (f"{theirs}.down_proj.bias", (d_model,)))
