"""Write the model of a run as a folder that other programs load."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moebench.analysis.trained_run import TrainedRun
from moebench.config import to_plain
from moebench.errors import UsageError, build_unknown_error
from moebench.parallel.manifest import parse_step
from moebench.pretrained.export.folder_writer import require_output, write_folder
from moebench.pretrained.export.model_card import ModelCard
from moebench.pretrained.export.tensors import DecoderSource, TensorSource, describe_for_transformers
from moebench.pretrained.export.tokenizer_files import (
    format_generation_config,
    format_tokenizer,
    format_tokenizer_config,
)
from moebench.pretrained.families import CONFIG, OWN_FORMAT
from moebench.pretrained.library import require_libraries
from moebench.pretrained.model import DTYPES
from moebench.pretrained.parent import CELL
from moebench.pretrained.tokenizer import TOKENIZER
from moebench.runs.environment import describe_version
from moebench.runs.experiment_record import read_records
from moebench.tasks.language import TextTask
from moebench.tasks.task import TASKS
from moebench.training.kept_weights import list_kept_weights

Format = Literal["hf", "safetensors"]
FORMATS: tuple[Format, ...] = ("hf", "safetensors")
README = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a run is exported."""

    out: Path
    format: str = "hf"
    step: int | None = None
    """Step of kept weights; None: the last checkpoint."""
    dtype: str = "float32"
    force: bool = False

    def check(self) -> None:
        """Raise UsageError for options that do not exist and an output folder that cannot be written."""
        require_libraries()
        if self.format not in FORMATS:
            raise build_unknown_error("--format", self.format, FORMATS)
        if self.dtype not in DTYPES:
            raise build_unknown_error("--dtype", self.dtype, DTYPES)
        require_output(self.out, force=self.force)


@dataclass(frozen=True, kw_only=True)
class ExportedRun:
    """What was written."""

    run: str
    format: str
    model_type: str
    """In config.json."""
    step: int
    num_parameters: int
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "run": self.run,
            "format": self.format,
            "model_type": self.model_type,
            "step": self.step,
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "files": [str(file) for file in self.files],
        }


def export_run(run: TrainedRun, options: ExportOptions, results: Path) -> ExportedRun:
    """Write a run's weights, configuration, tokenizer and model card to `options.out`; check the options before.

    Raises UsageError for weights that are not there, and as `write_model` does.
    """
    model, step = _load(run, options.step)
    return write_model(run, model.state_dict(), step, options, results)


def write_model(
    run: TrainedRun, weights: Mapping[str, Tensor], step: int, options: ExportOptions, results: Path
) -> ExportedRun:
    """Write weights as those of a run after a step.

    Raises UsageError for a model that no architecture of transformers computes (with format `hf`), and for a disk that
    is too small.
    """
    dtype = DTYPES[options.dtype]
    source = _describe(run, weights, dtype) if options.format == "hf" else TensorSource(weights=weights, dtype=dtype)
    texts = {CONFIG: _format_config(run, source), **_format_tokenizer_files(run, options.format)}
    model_type = json.loads(texts[CONFIG])["model_type"]
    card = _build_card(run, options, step, model_type, results)
    texts[README] = card.to_markdown()
    files = write_folder(options.out, texts, source)
    num_parameters = sum(value.numel() for value in weights.values())
    return ExportedRun(
        run=run.id,
        format=options.format,
        model_type=model_type,
        step=step,
        num_parameters=num_parameters,
        files=tuple(files),
    )


def _load(run: TrainedRun, step: int | None) -> tuple[torch.nn.Module, int]:
    """Return the model at a step, or after the last one, on the CPU, with the step."""
    steps, state = run.config.train.steps, run.folder.state()
    kept, damaged = list_kept_weights(run.folder)
    if step is None or step == steps:
        if state != "done":
            have = ", ".join(map(str, kept)) or "none"
            raise UsageError(
                f"run {run.id} is {state} (allowed: a run that is done, or --step of kept weights: {have})"
            )
        return run.load_model().cpu(), steps
    if step not in kept:
        broken = next((f" ({reason})" for path, reason in damaged.items() if parse_step(path) == step), "")
        have = ", ".join(map(str, [*kept, steps]))
        raise UsageError(
            f"--step {step}: run {run.id} has no weights of this step{broken}; allowed: {have}"
            " (train.keep_checkpoints keeps more)"
        )
    return run.load_model_at(kept[step]).cpu(), step


def _describe(run: TrainedRun, weights: Mapping[str, Tensor], dtype: torch.dtype) -> DecoderSource:
    try:
        if not isinstance(run.task, TextTask):
            raise UsageError(f"task.name={run.config.task.name}: only language models of text are written for it")
        return describe_for_transformers(run.config, weights, dtype)
    except UsageError as error:
        raise UsageError(
            f"--format hf: transformers cannot express run {run.id}: {error}; --format safetensors writes its weights"
            " and configuration"
        ) from error


def _format_config(run: TrainedRun, source: TensorSource) -> str:
    dtype = str(source.dtype).removeprefix("torch.")
    if isinstance(source, DecoderSource):
        assert isinstance(run.task, TextTask)
        length = run.task.sequence_length
        values = source.architecture.write(source.decoder)
        values |= {"max_position_embeddings": length, "dtype": dtype, "use_cache": True}
        values |= {"bos_token_id": None, "eos_token_id": run.task.text.separator, "pad_token_id": None}
    else:
        values = {
            "model_type": OWN_FORMAT,
            "vocab_size": run.task.vocab_size or 1,
            "num_hidden_layers": run.config.model.num_layers,
            "dtype": dtype,
            CELL: to_plain(run.config),
        }
    return json.dumps(values, indent=2) + "\n"


def _format_tokenizer_files(run: TrainedRun, format_: str) -> dict[str, str | bytes]:
    if not isinstance(run.task, TextTask):
        return {}
    text = run.task.text
    content = format_tokenizer(text.tokenizer_name, text.tokenizer)
    if format_ != "hf":
        return {TOKENIZER: content}
    return {
        TOKENIZER: content,
        "tokenizer_config.json": format_tokenizer_config(content, text.separator, run.task.sequence_length),
        "generation_config.json": format_generation_config(text.separator),
    }


def _build_card(run: TrainedRun, options: ExportOptions, step: int, model_type: str, results: Path) -> ModelCard:
    cell, config = run.cell, run.config
    result = run.folder.read_result() if step == config.train.steps else None
    main = TASKS.get(config.task.name).facts.metric
    metrics = result.metrics if result else {}
    record = read_records(results)[0].get(str(cell["experiment"]), {})
    return ModelCard(
        format=options.format,
        title=f"{cell['experiment']}: {run.arm}, seed {run.seed}",
        facts={
            "experiment": str(cell["experiment"]),
            "question": str(record.get("question") or "not recorded"),
            "arm": run.arm,
            "seed": str(run.seed),
            "run": run.id,
            "step": f"{step:,} of {config.train.steps:,}",
            **({"continues": ", ".join(map(str, config.init.parents))} if config.init.has_parent else {}),
            "router": config.router.name,
            "layout": config.layout.name,
            "task": config.task.name,
            "data": _describe_data(run),
            "architecture": model_type,
            "moebench of the run": str(cell.get("version") or "not recorded"),
            "moebench of the export": describe_version(),
        },
        metrics={name: value for name, value in metrics.items() if name.partition("/")[0] == main},
        limits=_list_limits(run, options),
        folder=options.out.name,
        dtype=options.dtype,
    )


def _describe_data(run: TrainedRun) -> str:
    """Return the name, the digest and the licence of the data, as far as they are known."""
    data, digest = getattr(run.config.task, "data", None), str(run.cell["data"]["digest"])[:12]
    if not isinstance(run.task, TextTask) or data is None:
        return f"digest {digest}; licence not recorded"
    if data.path is None and data.dataset is None:
        licence = "licences in moebench/tasks/data/LICENSES.md"
        return f"embedded text '{data.pack}' (digest {digest}), domains {', '.join(run.task.domains)}; {licence}"
    name = data.dataset or Path(data.path).name
    return f"{name} (digest {digest}), domains {', '.join(run.task.domains)}; licence not recorded"


def _list_limits(run: TrainedRun, options: ExportOptions) -> tuple[str, ...]:
    config = run.config
    limits = []
    if options.dtype != "float32":
        limits.append(f"Weights are rounded to {options.dtype}; the results above are those of fp32 weights.")
    if config.train.precision != "fp32":
        limits.append(
            f"The run computed in {config.train.precision}, with fp32 weights; the results above are of that."
        )
    if options.format == "hf" and config.router.name != "dense":
        limits.append(
            "Where two experts are nearly equal (logits within 0.00006 of each other), moebench takes the one with the"
            " lower index, and transformers the larger logit: such a token can get another expert."
        )
    if options.format == "hf" and getattr(getattr(config.task, "data", None), "mask_documents", False):
        limits.append(
            "In training and evaluation, attention stayed inside the documents of a window; here it does not."
        )
    if config.layout.capacity_factor_train is not None and config.router.name != "dense":
        limits.append("Experts had a capacity in training; they have none here or in the evaluation above.")
    return tuple(limits)
