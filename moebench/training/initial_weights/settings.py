"""Settings in which a child must agree with its parent, because weights of the same shape would mean something else."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.schema import CellConfig
from moebench.tasks.sources import file_digest
from moebench.tasks.text.tokens import tokenizer_file

FREE_KEYS = frozenset(
    [
        *("attention_dropout", "residual_dropout", "embedding_dropout"),
        "ffn_width",  # of experts: shapes decide
    ]
)
"""Keys of `model` that a child may change."""
SCALING_KEYS = frozenset(
    ["rope_scaling", "rope_factor", "rope_original_length", "rope_low_frequency", "rope_high_frequency"]
)
"""Keys of `model` that a child may change by choosing a scaling of positions, for longer sequences."""


def check_settings(config: CellConfig, settings: Mapping[str, Any], parent: str) -> None:
    """Raise UsageError, one line that names the key and both values, unless a child can take the parent's weights."""
    for key, theirs, ours in _list_differences(config, settings):
        raise UsageError(f"{key}: {ours} here, {theirs} in {parent} of init.from (allowed: {theirs})")


def _list_differences(config: CellConfig, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys that differ, with the value of the parent and that of the child."""
    ours, theirs = to_plain(config.model), settings.get("model") or {}
    for key, value in ours.items():
        if key in theirs and key not in FREE_KEYS and not _are_equal(key, ours, theirs):
            yield f"model.{key}", theirs[key], value
    our_task, their_task = to_plain(config.task), settings.get("task") or {}
    our_data, their_data = our_task.get("data") or {}, their_task.get("data") or {}
    key = "tokenizer"
    if key in our_data and key in their_data and not _is_same_tokenizer(our_data[key], their_data[key]):
        yield f"task.data.{key}", their_data[key], our_data[key]


def _are_equal(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    if key in SCALING_KEYS and ours["rope_scaling"] != "none":
        return True
    if key == "embedding_scale":
        scales = [_read_embedding_scale(model) for model in (ours, theirs)]
        return bool(scales[0] == scales[1])
    if key == "num_kv_heads":
        return bool((ours[key] or ours["num_heads"]) == (theirs[key] or theirs.get("num_heads")))
    return bool(ours[key] == theirs[key])


def _read_embedding_scale(model: Mapping[str, Any]) -> Any:
    """Return the factor on embedded inputs, as `select_embedding_scale` does, of plain data."""
    if model.get("embedding_scale") is not None:
        return model["embedding_scale"]
    return float(model["d_model"] ** 0.5) if model.get("tie_embeddings") else 1.0


def _is_same_tokenizer(ours: Any, theirs: Any) -> bool:
    """Return whether two values of `task.data.tokenizer` are equal, or files of equal content."""
    if ours == theirs:
        return True
    try:
        files = [tokenizer_file(name) if isinstance(name, str) else None for name in (ours, theirs)]
        digests = {file_digest(Path(file)) for file in files if file is not None}
    except (UsageError, OSError):
        return False
    return None not in files and len(digests) == 1
