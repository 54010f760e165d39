"""The named sizes as rows of a table."""

from typing import Any

from moebench.conversion import apply_values, convert
from moebench.experiment.files import list_sizes
from moebench.experiment.sizes import SizeConfig, read_size
from moebench.reporting.formatting import format_count
from moebench.schema import ModelConfig, TrainConfig


def list_size_rows() -> list[dict[str, Any]]:
    """Return a JSON-ready row for each size: budget, shape of the model, tokens, and its keys."""
    return [_build_row(name, str(file), read_size(name)) for name, file in list_sizes().items()]


def _build_row(name: str, file: str, size: SizeConfig) -> dict[str, Any]:
    base = convert(size.base, Any, "base")
    model, train = (
        apply_values(ModelConfig(), base.get("model", {})),
        apply_values(TrainConfig(), base.get("train", {})),
    )
    length = base.get("task", {}).get("sequence_length")
    tokens = train.steps * train.batch_size * int(length) if length is not None else None
    return {
        "name": name,
        "FLOPs": f"{size.flops:.2g}",
        "model": f"{model.num_layers}×{model.d_model}",
        "tokens": format_count(tokens),
        "tasks": size.tasks,
        "about": size.about,
        "file": file,
        "base": base,
    }
