"""Options of the transformer that are not the default, for tests that they hold wherever a model is built."""

from typing import Any

WITHOUT_DRAWS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "attention_bias": "all",
    "ffn_bias": True,
    "norm": "layernorm",
    "norm_eps": 1e-4,
    "qk_norm": "head",
    "embedding_scale": 2.0,
    "residual_scale": 0.7,
    "rope_scaling": "llama3",
    "rope_factor": 4.0,
    "rope_original_length": 6,
}
DROPOUT: dict[str, Any] = {"attention_dropout": 0.2, "residual_dropout": 0.1, "embedding_dropout": 0.1}
ALL_OPTIONS: dict[str, Any] = WITHOUT_DRAWS | DROPOUT
