"""Rotary positions: the keys `rope_*` of the section `model`, and `rope_parameters` of config.json."""

from collections.abc import Mapping
from typing import Any

from moebench.model_config import ModelConfig
from moebench.pretrained.decoders.config_keys import ConfigKeys

KINDS = ("default", "linear", "llama3")


def read_rotary(config: ConfigKeys) -> dict[str, Any]:
    """Return the keys of the section `model`; raise UsageError for a scaling that moebench does not have."""
    rope = config.values.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in KINDS or not _is_number(rope.get("rope_theta")):
        raise config.refuse("rope_parameters", f"a rope_theta, and a rope_type of {', '.join(KINDS)}")
    share = rope.get("partial_rotary_factor") or config.values.get("partial_rotary_factor") or 1.0
    if share != 1:
        raise config.refuse("rope_parameters", "partial_rotary_factor 1.0: all of a head is rotated")
    settings: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return settings
    settings |= {"rope_scaling": kind, "rope_factor": rope.get("factor")}
    if kind == "llama3":
        settings |= {
            "rope_original_length": rope.get("original_max_position_embeddings"),
            "rope_low_frequency": rope.get("low_freq_factor"),
            "rope_high_frequency": rope.get("high_freq_factor"),
        }
    missing = next((key for key, value in settings.items() if key != "rope_scaling" and not _is_number(value)), None)
    if missing:
        raise config.refuse("rope_parameters", f"numbers for what rope_type {kind} needs")
    return settings


def write_rotary(model: ModelConfig) -> Mapping[str, Any]:
    """Return `rope_parameters` for a model's angles: the same numbers, whatever the name of the scaling."""
    theta = float(model.rope_theta)
    match model.rope_scaling:
        case "linear":
            return {"rope_type": "linear", "rope_theta": theta, "factor": model.rope_factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": model.rope_factor,
                "low_freq_factor": model.rope_low_frequency,
                "high_freq_factor": model.rope_high_frequency,
                "original_max_position_embeddings": model.rope_original_length,
            }
        case "ntk":  # a larger base
            width = model.d_model // model.num_heads
            return {"rope_type": "default", "rope_theta": theta * model.rope_factor ** (width / max(width - 2, 1))}
        case _:
            return {"rope_type": "default", "rope_theta": theta}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
