"""Load the model of a checked folder through transformers: no path is given to it, so it looks for no other file."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from moebench.errors import UsageError, build_unknown_error
from moebench.pretrained.families import CONFIG, OWN_FORMAT
from moebench.pretrained.folder import PretrainedFolder
from moebench.pretrained.memory import require_memory
from moebench.pretrained.weights import StoredTensor
from moebench.routing.layer_name import LayerName

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
AS_STORED = "auto"
NAMED_ERRORS = 2
"""Weights that a message names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedModel:
    """A loaded model in evaluation mode, with its MoE layers."""

    module: Any
    """The model of transformers, with its head."""
    routers: Mapping[LayerName, nn.Module]
    """MoE layer, counted from 0 over all blocks of its half -> its router module."""
    unused: tuple[str, ...]
    """Stored weights that the architecture does not have."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.module.dtype
        return dtype


def load_model(folder: PretrainedFolder, dtype: str = AS_STORED) -> PretrainedModel:
    """Return the model of a folder on the CPU, with all weights in one type: float32, bfloat16, float16 or `auto`.

    Raises UsageError for another type, for a model that does not fit into the available memory, for a configuration
    that transformers refuses, and for weights that are missing or have other shapes than it gives.
    """
    chosen = choose_dtype(folder, dtype)
    with quiet_library():
        config = build_config(folder)
        class_ = _find_class(folder)
        require_memory(folder, max(folder.num_parameters, _count_parameters(class_, config, folder)), chosen)
        with ExitStack() as files:
            model, info = _load_weights(class_, config, _open_tensors(folder.tensors, files), chosen, folder)
    _require_all_weights(info, folder)
    routers = {_name_layer(name): module for name, module in _find_routers(model, folder)}
    if folder.family.router and not routers:
        raise UsageError(f"{folder.path}: transformers built a {folder.family.title} model without experts")
    model.requires_grad_(False)
    return PretrainedModel(module=model.eval(), routers=routers, unused=tuple(sorted(info["unexpected_keys"])))


def choose_dtype(folder: PretrainedFolder, dtype: str) -> torch.dtype:
    """Return the type that a name stands for; `auto` is that of most stored values."""
    if dtype == AS_STORED:
        sizes: dict[str, int] = {}
        for tensor in folder.tensors.values():
            name = STORED.get(tensor.dtype, "float32")
            sizes[name] = sizes.get(name, 0) + tensor.size
        dtype = max(sizes, key=sizes.__getitem__)
    if dtype not in DTYPES:
        raise build_unknown_error("--dtype", dtype, (AS_STORED, *DTYPES))
    return DTYPES[dtype]


@contextmanager
def quiet_library() -> Iterator[None]:
    """Silence the progress bars and reports of transformers, whose content is returned or raised here."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _find_class(folder: PretrainedFolder) -> Any:
    import transformers

    if folder.family.model_type == OWN_FORMAT:
        raise UsageError(
            f"{folder.path / CONFIG}: model_type is {OWN_FORMAT}: transformers does not load it (allowed: what"
            " `moebench export --format hf` writes; init.from and moebench.load_model read it)"
        )
    return getattr(transformers, folder.family.architecture)


def build_config(folder: PretrainedFolder) -> Any:
    """Return the configuration of transformers, with its defaults; raise UsageError where it refuses a value."""
    try:
        return _find_class(folder).config_class.from_dict(dict(folder.config))
    except Exception as error:  # of many kinds, by its strict validation
        raise UsageError(f"{folder.path / CONFIG}: transformers refuses it ({_first_line(error)})") from error


def _count_parameters(class_: Any, config: Any, folder: PretrainedFolder) -> int:
    """Return how many values the model would have, without memory for them."""
    try:
        with torch.device("meta"):
            model = class_(config)
    except Exception as error:  # of many kinds: divisions by zero, unknown activations, shapes that do not fit
        raise UsageError(f"{folder.path / CONFIG}: transformers cannot build it ({_first_line(error)})") from error
    return sum(prod(parameter.shape) for parameter in model.parameters())


def _open_tensors(tensors: Mapping[str, StoredTensor], files: ExitStack) -> dict[str, Any]:
    """Return the stored tensors by name, memory-mapped: each is read when it is copied into the model."""
    from safetensors import safe_open

    opened = {}
    for file in {tensor.file for tensor in tensors.values()}:
        opened[file] = files.enter_context(safe_open(file, framework="pt"))
    return {name: opened[tensor.file].get_slice(name) for name, tensor in tensors.items()}


def _load_weights(
    class_: Any, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype, folder: PretrainedFolder
) -> tuple[Any, Mapping[str, Any]]:
    try:
        model, info = class_.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="sdpa" if class_._supports_sdpa else "eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported in one line by `_require_all_weights`
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{folder.path}: transformers cannot load it ({_first_line(error)})") from error
    return model, info


def _require_all_weights(info: Mapping[str, Any], folder: PretrainedFolder) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise UsageError(
            f"{folder.path}: the weight {name} has the shape {tuple(stored)}, and {CONFIG} gives {tuple(expected)}"
            f" ({len(mismatched)} such weights)"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - NAMED_ERRORS} more" if len(missing) > NAMED_ERRORS else ""
        raise UsageError(f"{folder.path}: lacks the weights {', '.join(missing[:NAMED_ERRORS])}{more}")


def _find_routers(model: nn.Module, folder: PretrainedFolder) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == folder.family.router)


def _name_layer(module_name: str) -> LayerName:
    """Return the layer of a module: model.layers.3.mlp.gate is 3, decoder.block.1.layer.2.mlp.router decoder.1."""
    first, *rest = module_name.split(".")
    block = next(int(part) for part in rest if part.isdecimal())
    return LayerName(block=block, half="encoder" if first == "encoder" else "decoder" if first == "decoder" else None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
