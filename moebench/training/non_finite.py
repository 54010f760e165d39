"""Find the first tensor that is not finite, by repeating a step or an evaluation with hooks on every module.

Nothing here runs in a step whose loss and gradient are finite. A step can be repeated exactly: its batch and all draws
are functions of the seed and the step, and the parameters have not been updated.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.models.transformer import BatchContext
from moebench.parallel.mesh import Mesh
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.deferred_logits import ModelOutput
from moebench.tasks.task import Batch, Task
from moebench.training.batches import BatchSource, build_loss_normalizer
from moebench.training.evaluation import batch_context, evaluation_mode, select_rank_part, training_precision
from moebench.training.model import Model
from moebench.training.objective import LossNormalizer, Objective

PARAMETER, INPUT, ACTIVATION, LOSS, GRADIENT = range(5)
"""Stages of a step, in order."""


class Trainable(Protocol):
    """What is needed of a cell's module to repeat one of its steps."""

    model: Model
    mesh: Mesh
    config: CellConfig
    task: Task
    source: BatchSource

    @property
    def device(self) -> Any:
        """The device of the module."""

    def run_passes(self, batch: Batch, ctx: BatchContext) -> tuple[list[ModelOutput], list[list[LayerRecord]]]:
        """Return the outputs and records of each forward pass."""

    def compute_loss(
        self,
        batch: Batch,
        outputs: Sequence[ModelOutput],
        records: Sequence[list[LayerRecord]],
        normalizer: LossNormalizer | None = None,
    ) -> tuple[Objective, list[list[LayerRecord]]]:
        """Return the loss of the passes."""


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """A tensor that is not finite, in the order in which a step computes them."""

    micro_batch: int
    stage: int
    index: int
    """Position within the stage; on several processes they are counted in the same way."""
    name: str

    def describe(self, rank: int, num_ranks: int) -> str:
        """Return the tensor, with its rank where there are several."""
        return f"first in {self.name}" + (f" on rank {rank}" if num_ranks > 1 else "")


@dataclass
class FindingList:
    """What the hooks of one process have found."""

    findings: list[Finding] = field(default_factory=list)
    micro_batch: int = 0
    counter: Iterator[int] = field(default_factory=itertools.count)

    def check(self, stage: int, name: str, value: Any) -> None:
        """Add a finding if the value holds a number that is not finite; count it in any case."""
        index = next(self.counter)
        part = _find_non_finite(value)
        if part is not None:
            self.findings.append(Finding(micro_batch=self.micro_batch, stage=stage, index=index, name=name + part))


def trace_step(module: Trainable, step: int) -> str:
    """Repeat update `step` (from 0), and return in words where the first value that is not finite occurs.

    All processes of the mesh call it. No gradient is accumulated and nothing is updated.
    """
    log = FindingList()
    note = ""
    try:
        _check_parameters(module.model, log)
        with _uncompiled(module.config), _watch_modules(module.model, log, gradients=True):
            for micro_batch, batch in enumerate(module.source.make_micro_batches(step)):
                _repeat_micro_batch(module, step, micro_batch, batch, log)
    except Exception as error:
        note = f" (its repetition failed: {type(error).__name__})"
    return _select_first(log, module.mesh) or (
        "every loss and gradient of its repetition is finite, and the norm, or a sum over processes, is not" + note
    )


def trace_evaluation(module: Trainable, batches: Sequence[Batch]) -> str:
    """Repeat an evaluation, and return in words where the first value that is not finite occurs."""
    log = FindingList()
    _check_parameters(module.model, log)
    first = _select_first(log, module.mesh)
    precision = training_precision(module.config.train, module.device)
    with evaluation_mode(module.model), precision, _uncompiled(module.config):
        for number, batch in enumerate(batches if not first else ()):
            part = select_rank_part(batch, module.mesh, module.model).to(module.device)
            with _watch_modules(module.model, log, gradients=False):
                _check_batch(part, log)
                ctx = batch_context(part, training=False, seed=module.config.seed, micro_batch=number)
                output, _ = module.model(part, ctx)
                for name, value in module.task.compute_sums(output, part).items():
                    log.check(LOSS, f"the sum of {name}", value)
            first = _select_first(log, module.mesh)
            if first:
                return f"batch {number} of the split, {first}"
    return first or "the values of each batch are finite in their repetition"


def _uncompiled(config: CellConfig) -> contextlib.AbstractContextManager[Any]:
    """Return a context without compiled graphs, which call no hook of a module inside."""
    return torch.compiler.set_stance("force_eager") if config.train.compile else contextlib.nullcontext()


def _repeat_micro_batch(module: Trainable, step: int, micro_batch: int, batch: Batch, log: FindingList) -> None:
    log.micro_batch = micro_batch
    batch = batch.to(module.device)
    _check_batch(batch, log)
    ctx = batch_context(batch, training=True, seed=module.config.seed, step=step, micro_batch=micro_batch)
    with training_precision(module.config.train, module.device):
        outputs, records = module.run_passes(batch, ctx)
        normalizer = build_loss_normalizer(batch, module.config, module.mesh)
        objective, _ = module.compute_loss(batch, outputs, records, normalizer)
    log.check(LOSS, "the loss of the task", objective.task)
    for name, value in objective.weighted.items():
        log.check(LOSS, f"the loss {name}", value)
    named = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
    # Not `backward`: it would accumulate gradients.
    grads = torch.autograd.grad(objective.total, [p for _, p in named], allow_unused=True)
    for (name, _), grad in zip(named[::-1], grads[::-1], strict=True):  # those near the loss are computed first
        log.check(GRADIENT, f"the gradient of the parameter {name}", grad)


def _check_parameters(model: nn.Module, log: FindingList) -> None:
    for name, parameter in model.named_parameters():
        log.check(PARAMETER, f"the parameter {name}", parameter)
    for name, buffer in model.named_buffers():
        log.check(PARAMETER, f"the buffer {name}", (_InfinityAllowed(buffer),))


def _check_batch(batch: Batch, log: FindingList) -> None:
    for entry in dataclasses.fields(batch):
        log.check(INPUT, f"the batch ({entry.name})", getattr(batch, entry.name))


@contextlib.contextmanager
def _watch_modules(model: nn.Module, log: FindingList, *, gradients: bool) -> Iterator[None]:
    """Check the outputs of every module, and with `gradients` the gradients of these outputs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(_make_hook(name or "the model", log, gradients)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(name: str, log: FindingList, gradients: bool) -> Callable[[nn.Module, Any, Any], None]:
    def check_gradient(gradient: Tensor) -> None:
        log.check(GRADIENT, f"the gradient of the activation of {name}", gradient)

    def check_output(_: nn.Module, __: Any, output: Any) -> None:
        log.check(ACTIVATION, f"the activation of {name}", output)
        for value in output if isinstance(output, tuple) else (output,):
            if gradients and isinstance(value, Tensor) and value.requires_grad:
                register: Any = value.register_hook  # it has no types
                register(check_gradient)

    return check_output


@dataclass(frozen=True)
class _InfinityAllowed:
    """A value in which an infinity is allowed, such as a threshold or a mask."""

    value: Any


def _find_non_finite(value: Any, *, allows_infinity: bool = False, depth: int = 0) -> str | None:
    """Return the part of a value that is not finite, as text to append to its name; None if there is none.

    In the fields of a routing, infinities are allowed: they mask experts.
    """
    if isinstance(value, Tensor):
        local = (value.to_local() if isinstance(value, DTensor) else value).detach()
        if not local.is_floating_point():
            return None
        is_bad = local.isnan() if allows_infinity else ~local.isfinite()
        if not bool(is_bad.any()):
            return None
        return f": {int(is_bad.sum())} of {local.numel()} values are {'nan' if bool(local.isnan().any()) else 'inf'}"
    if isinstance(value, tuple | list):
        parts = (_find_non_finite(each, allows_infinity=allows_infinity, depth=depth) for each in value)
        return next((part for part in parts if part is not None), None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and depth < 3:
        for entry in dataclasses.fields(value):
            part = _find_non_finite(getattr(value, entry.name), allows_infinity=True, depth=depth + 1)
            if part is not None:
                return part if isinstance(value, _InfinityAllowed) else f" ({entry.name}){part.removeprefix(' ')}"
    return None


def _select_first(log: FindingList, mesh: Mesh) -> str:
    """Return the first finding of all processes in words; empty if there is none."""
    of_ranks: list[Finding | None] = mesh.gather_objects(min(log.findings, default=None))
    firsts = [(finding, rank) for rank, finding in enumerate(of_ranks) if finding is not None]
    if not firsts:
        return ""
    finding, rank = min(firsts)
    return finding.describe(rank, mesh.size)
