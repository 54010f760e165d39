"""The rules of a task that are checked when it is prepared; an error is one line with the task's file."""

from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from moebench.components import TaskConfig
from moebench.plugin_errors import ContractError
from moebench.registry import Entry
from moebench.tasks.task import TASKS, Batch, Task, TaskFacts

TaskEntry = Entry[type[Task], TaskFacts]


def read_source_digest(config: TaskConfig) -> str:
    """Return the digest of the data that a configuration names; raise ContractError unless it is a text."""
    entry = TASKS.get(config.name, where="task.name")
    with entry.convert_errors("source_digest"):
        digest = entry.item.source_digest(config)
    if not (isinstance(digest, str) and digest):
        raise ContractError(f"{entry.label}: source_digest must return a text that identifies the data, got {digest!r}")
    return digest


def build_task(config: TaskConfig, cache: Path) -> Task:
    """Return a task with its data ready; raise ContractError, which names its file, for one that cannot be used."""
    entry = TASKS.get(config.name, where="task.name")
    with entry.convert_errors("prepare"):
        task = entry.item.prepare(config, cache)
    if entry.is_plugin:
        for problem in _list_attribute_problems(task, entry.facts):
            raise ContractError(f"{entry.label}: {problem}")
    return task


def _list_attribute_problems(task: object, facts: TaskFacts) -> Iterator[str]:
    """Yield what is wrong with the attributes of a task that shared code reads."""
    if not isinstance(task, Task):
        yield f"prepare must return the task, an instance of its class, got {type(task).__name__}"
        return
    domains = getattr(task, "domains", None)
    if not isinstance(domains, tuple | list) or not all(isinstance(name, str) and name for name in domains):
        yield f"domains must be a tuple of names, got {domains!r}"
    elif not domains or len(set(domains)) < len(domains):
        yield f"domains must be different names, at least one, got {domains!r}"
    elif not (_is_count(task.num_held_out, 0) and task.num_held_out < len(domains)):
        yield f"num_held_out must be from 0 to {len(domains) - 1}, got {task.num_held_out!r}"
    for name in ("digest", "eval_digest"):
        value = getattr(task, name, None)
        if not (isinstance(value, str) and value):
            yield f"{name} must be a text, set in the class or by prepare, got {value!r}"
    required = {
        "sequence_length": True,
        "decoder_length": facts.is_encoder_decoder,
        "vocab_size": facts.output == "tokens",
    }
    for name, is_required in required.items():
        value = getattr(task, name, None)
        if not _is_count(value, 1) and (is_required or value is not None):
            yield f"{name} must be a whole number of at least 1, got {value!r}"
    count_V = task.token_count_V
    if count_V is not None and not (isinstance(count_V, Tensor) and count_V.shape == (task.vocab_size,)):
        given = list(count_V.shape) if isinstance(count_V, Tensor) else type(count_V).__name__
        yield f"token_count_V must be a tensor with one count for each of vocab_size={task.vocab_size} ids, got {given}"


def _is_count(value: object, smallest: int) -> bool:
    return isinstance(value, Integral) and int(value) >= smallest


def list_batch_problems(batch: object, task: Task, facts: TaskFacts, num_sequences: int | None) -> Iterator[str]:
    """Yield what is wrong with a batch, worded to follow the name of the method that returned it.

    `num_sequences`: the required number of sequences of a training batch; None: the batch is from an evaluation set.
    """
    if not isinstance(batch, Batch):
        yield f"must return a Batch, got {type(batch).__name__}"
        return
    for name in ("input_BL", "target_BP", "weight_BP", "domain_B"):
        value = getattr(batch, name)
        if not isinstance(value, Tensor) or value.dim() == 0:
            yield f"must return a Batch whose {name} is a tensor of B sequences, got {type(value).__name__}"
            return
    size, limit = len(batch.input_BL), task.num_trained_domains if num_sequences is not None else len(task.domains)
    if num_sequences not in (None, size):
        yield f"must return {num_sequences} sequences, got input_BL with {size}"
    yield from _list_shape_problems(batch, size)
    yield from _list_id_problems(batch.input_BL, "input_BL", task.vocab_size)
    if facts.is_encoder_decoder != (batch.decoder_input_BP is not None):
        needed = "have" if facts.is_encoder_decoder else "leave out"
        yield f"must {needed} decoder_input_BP, as TaskFacts(is_encoder_decoder={facts.is_encoder_decoder}) declares"
    domain_B = batch.domain_B
    if domain_B.dtype != torch.int64 or not 0 <= int(domain_B.min()) <= int(domain_B.max()) < limit:
        kind = "trained domains" if num_sequences is not None else "domains"
        yield f"must return domain_B as int64 from 0 to {limit - 1} ({kind}: {', '.join(task.domains[:limit])})"


def _list_shape_problems(batch: Batch, size: int) -> Iterator[str]:
    """Yield which tensors of a batch do not have the shape that its input and its weights require."""
    if batch.input_BL.dim() < 2 or batch.weight_BP.dim() != 2:
        shapes = f"{list(batch.input_BL.shape)} and {list(batch.weight_BP.shape)}"
        yield f"must return input_BL of shape [B, L] or [B, L, width] and weight_BP of shape [B, P], got {shapes}"
        return
    positions, predictions = batch.input_BL.shape[:2], batch.weight_BP.shape
    wanted = {
        "domain_B": ((size,), torch.int64),
        "label_BL": (positions, torch.int64),
        "valid_BL": (positions, torch.bool),
        "document_BL": (positions, torch.int64),
        "count_BP": (predictions, torch.int64),
    }
    for name, (shape, dtype) in wanted.items():
        value = getattr(batch, name)
        if value is not None and not (isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype):
            given = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            yield f"must return {name} as {dtype} of shape {list(shape)}, got {given}"
    for name in ("target_BP", "weight_BP", "decoder_input_BP"):
        value = getattr(batch, name)
        if value is not None and len(value) != size:
            yield f"must return {size} sequences, as many as input_BL has, got {name} with {len(value)}"


def _list_id_problems(input_BL: Tensor, name: str, vocab_size: int | None) -> Iterator[str]:
    """Yield what is wrong with token ids; nothing for vectors, which may have any type that the embedding accepts."""
    if input_BL.is_floating_point() or input_BL.dim() > 2:
        return
    if input_BL.dtype != torch.int64:
        yield f"must return {name} as int64 token ids [B, L], or as vectors [B, L, width], got {input_BL.dtype} [B, L]"
    elif vocab_size is not None and not 0 <= int(input_BL.min()) <= int(input_BL.max()) < vocab_size:
        yield (
            f"must return {name} with token ids from 0 to {vocab_size - 1} (vocab_size={vocab_size}), got"
            f" {int(input_BL.min())} to {int(input_BL.max())}"
        )


def list_loss_problems(loss_BP: object, batch: Batch) -> Iterator[str]:
    """Yield what is wrong with the type and shape of a loss, worded to follow the name of the method."""
    if not isinstance(loss_BP, Tensor):
        yield f"must return a tensor with one value for each prediction, got {type(loss_BP).__name__}"
    elif loss_BP.shape != batch.weight_BP.shape:
        shape = list(batch.weight_BP.shape)
        yield f"must return one value for each prediction, shape {shape} as weight_BP, got {list(loss_BP.shape)}"
    elif not loss_BP.is_floating_point():
        yield f"must return floating values, got {loss_BP.dtype}"


def check_loss(name: str, loss_BP: Tensor, batch: Batch) -> Tensor:
    """Return the loss of a task; raise ContractError, which names its file, unless it has one value per prediction."""
    for problem in list_loss_problems(loss_BP, batch):
        raise ContractError(f"{TASKS.get(name).label}: loss {problem}")
    return loss_BP
