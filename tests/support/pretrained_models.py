"""Small random models of transformers, written to folders by `save_pretrained`, with a tokenizer."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moebench.tasks.text.embedded_tokenizer import train_bpe

VOCAB = 320
TEXT = "The mill stood by the river, and the miller's 3 daughters counted 12 sacks of flour each day. "
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
NARROW = {"intermediate_size": 48, "moe_intermediate_size": 24}
LATENT = {
    **NARROW,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 48, "num_experts": 8},
    "qwen2_moe": {**NARROW, "num_experts": 8, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_moe": {**NARROW, "num_experts": 8, "mlp_only_layers": [1], "head_dim": 8},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "glm4_moe": {
        **NARROW,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
        "use_qk_norm": True,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 8,
        "expert_capacity": 4,
        "decoder_start_token_id": 0,
    },
}
"""`model_type` -> options besides SIZES: dense layers, shared experts, groups, a capacity that drops."""
DENSE_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48},
    "arcee": {"intermediate_size": 48, "hidden_act": "gelu"},
    "qwen2": {"intermediate_size": 48},
    "qwen3": {"intermediate_size": 48, "head_dim": 8},
}
"""The same for models without experts."""
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(20))
NOT_OF_SWITCH = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
)


def write_model(folder: Path, model_type: str, change: Callable[[Any], None] | None = None, **options: Any) -> Any:
    """Write a random model with its tokenizer to a folder, and return it; `change`: applied to it before."""
    import transformers

    from moebench.pretrained.families import PARENTS

    class_ = getattr(transformers, PARENTS[model_type].architecture)
    sizes = {
        key: value for key, value in SIZES.items() if model_type != "switch_transformers" or key not in NOT_OF_SWITCH
    }
    torch.manual_seed(3)
    model = class_(class_.config_class(**{**sizes, **(OPTIONS | DENSE_OPTIONS)[model_type], **options})).eval()
    with torch.no_grad():  # logits large enough to differ between tokens
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "classifier.weight")):
                parameter.mul_(20)
    if change is not None:
        change(model)
    save_model(model, folder)
    write_tokenizer(folder, has_sentinels=model_type == "switch_transformers")
    return model


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model without the progress bars of the library."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model.save_pretrained(folder, **options)


@cache
def _tokenizer(has_sentinels: bool) -> str:
    tokenizer = train_bpe([TEXT * 4], 290)
    if has_sentinels:
        tokenizer.add_special_tokens(list(SENTINELS))
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, *, has_sentinels: bool = False) -> None:
    """Write a byte-level BPE of at most VOCAB ids."""
    (folder / "tokenizer.json").write_text(_tokenizer(has_sentinels), encoding="utf-8")


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; those that are None are removed."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in config.items() if value is not None or key not in values}
    file.write_text(json.dumps(kept), encoding="utf-8")
