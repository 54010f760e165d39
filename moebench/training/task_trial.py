"""The trial of a plug-in's task before anything is trained: batches, modules, loss and metrics of a few sequences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from moebench.models.storageless import build_without_storage
from moebench.models.transformer import init_weights
from moebench.plugin_errors import ContractError
from moebench.ranks import Span
from moebench.runs.journal import is_valid_metric_name
from moebench.schema import CellConfig
from moebench.tasks.contract import TaskEntry, list_batch_problems, list_loss_problems
from moebench.tasks.task import TASKS, Batch, LabelKind, Task

NUM_SEQUENCES = 2
MAX_PARAMETERS = 2**26
"""Embedding and head are built only up to this number of parameters: larger ones need too much memory."""
BUGS = (TypeError, LookupError, AttributeError, NameError, NotImplementedError)
"""Errors in the code, which a trained model would raise too."""


def try_task(config: CellConfig, task: Task) -> None:
    """Try the task of a cell if it is a plug-in; built-in tasks are checked by the tests.

    Raises ContractError, which names the task's file and the rule that it breaks.
    """
    entry = TASKS.get(config.task.name)
    if not entry.is_plugin:
        return
    trial = _Trial(entry=entry, config=config, task=task)
    train = trial.draw_training_batch()
    evaluated = [trial.draw_evaluation_batch(split) for split in ("validation", "test")]
    for batch in evaluated:
        trial.check_labels(batch)
    modules = trial.build_modules()
    if modules is not None:
        trial.check_loss(modules, train)
        trial.check_quality(modules, evaluated[-1], "test")


@dataclass(frozen=True, kw_only=True)
class _Trial:
    entry: TaskEntry
    config: CellConfig
    task: Task

    def refuse(self, problems: Iterable[str], method: str = "") -> None:
        """Raise ContractError with the first problem, if there is one."""
        for problem in problems:
            raise ContractError(f"{self.entry.label}: {f'{method} {problem}'.strip()}")

    def draw_training_batch(self) -> Batch:
        """Return the first sequences of the first training batch; refuse batches that are not reproducible."""
        size, seed = self.config.train.batch_size, self.config.seed
        number = min(NUM_SEQUENCES, size)
        with self.entry.convert_errors("train_batch"):
            part = self.task.train_batch(size, seed, 0, slice(0, number))
            self.refuse(
                list_batch_problems(part, self.task, self.entry.facts, number), "train_batch with part=slice(0, 2)"
            )
            again = self.task.train_batch(size, seed, 0, slice(0, number))
            whole = self.task.train_batch(size, seed, 0)
        self.refuse(list_batch_problems(whole, self.task, self.entry.facts, size), "train_batch")
        if not _are_equal(part, again):
            self.refuse(
                ["must be a function of its arguments: two calls return different batches (use seeds.make_generator)"],
                "train_batch",
            )
        if not _are_equal(part, whole.part(Span(start=0, length=number, total=size))):
            self.refuse(
                ["must return the sequences `part` of the batch; with slice(0, 2) it returned others"], "train_batch"
            )
        with self.entry.convert_errors("count_positions"):
            positions: object = self.task.count_positions(size, seed, 0)
        if not isinstance(positions, Integral):
            self.refuse([f"must return a whole number, got {positions!r}"], "count_positions")
        return part

    def draw_evaluation_batch(self, split: str) -> Batch:
        """Return the first sequences of an evaluation set; refuse a set that is not the same in each call."""
        method, size = f"eval_batches('{split}')", self.config.train.batch_size
        with self.entry.convert_errors(method):
            batches, again = (self.task.eval_batches(split, size) for _ in range(2))
            if not _has_items(batches) or not len(batches):
                self.refuse([f"must return a sequence of batches, at least one, got {_describe(batches)}"], method)
            first, last = batches[0], batches[len(batches) - 1]
            for batch in (first, last):
                self.refuse(list_batch_problems(batch, self.task, self.entry.facts, None), method)
            if not _are_equal(first, again[0]):
                self.refuse(["must return the same set each time; the first batches of two calls differ"], method)
        for batch in (first, last):
            is_held_out_B = batch.domain_B >= self.task.num_trained_domains
            if bool(is_held_out_B.any()) and not bool(is_held_out_B.all()):
                self.refuse(["must not mix trained and held-out domains in a batch"], method)
        total = len(first.domain_B)
        return first.part(Span(start=0, length=min(NUM_SEQUENCES, total), total=total))

    def check_labels(self, batch: Batch) -> None:
        """Refuse kinds of labels whose values are not valid."""
        with self.entry.convert_errors("label_kinds"):
            kinds: Any = self.task.label_kinds()
            for kind in kinds:
                if not isinstance(kind, LabelKind):
                    self.refuse([f"must return LabelKind objects, got {_describe(kind)}"], "label_kinds")
                label_BL = kind.read(batch).expand(batch.input_BL.shape[:2])
                label_N = label_BL.flatten() if batch.valid_BL is None else label_BL[batch.valid_BL]
                if len(label_N) and not 0 <= int(label_N.min()) <= int(label_N.max()) < len(kind.values):
                    limit = len(kind.values) - 1
                    self.refuse([f"must read labels from 0 to {limit} of kind '{kind.name}'"], "label_kinds")

    def build_modules(self) -> tuple[nn.Module, nn.Module] | None:
        """Return embedding and head with their initial weights; None if they are too large."""
        with build_without_storage():
            if sum(parameter.numel() for part in self._build() for parameter in part.parameters()) > MAX_PARAMETERS:
                return None
        with torch.random.fork_rng(devices=[]):
            modules = self._build()
        for part in modules:
            init_weights(part, self.config.seed)
        return modules

    def _build(self) -> tuple[nn.Module, nn.Module]:
        d_model, modules = self.config.model.d_model, []
        for name in ("build_embedding", "build_head"):
            with self.entry.convert_errors(name):
                module = getattr(self.task, name)(d_model)
            if not isinstance(module, nn.Module):
                self.refuse([f"must return a torch.nn.Module, got {_describe(module)}"], name)
            modules.append(module)
        return modules[0], modules[1]

    def _compute_output(self, modules: tuple[nn.Module, nn.Module], batch: Batch) -> object:
        """Return the output of the head for the embedded inputs, without the blocks between them."""
        if self.entry.facts.is_encoder_decoder:
            batch = batch.decoder_batch
        embedding, head = modules
        with self.entry.convert_errors("the module of build_embedding"):
            x_BLD = embedding(batch.input_BL)
        shape = (*batch.input_BL.shape[:2], self.config.model.d_model)
        if not isinstance(x_BLD, Tensor) or x_BLD.shape != shape:
            self.refuse(
                [f"must return vectors of shape {list(shape)}, got {_describe(x_BLD)}"], "the module of build_embedding"
            )
        if not x_BLD.requires_grad and torch.is_grad_enabled():
            x_BLD = x_BLD.detach().requires_grad_()  # as after the blocks, whose parameters are trained
        with self.entry.convert_errors("the module of build_head"):
            return head(x_BLD)

    def check_loss(self, modules: tuple[nn.Module, nn.Module], batch: Batch) -> None:
        """Refuse a loss that is not finite or cannot be differentiated."""
        output = self._compute_output(modules, batch)
        with self.entry.convert_errors("loss"):
            loss_BP = self.task.loss(output, batch)
        self.refuse(list_loss_problems(loss_BP, batch), "loss")
        counted_N = loss_BP.flatten() if batch.count_BP is None else loss_BP[batch.count_BP > 0]
        if not bool(counted_N.isfinite().all()):
            bad = int((~counted_N.isfinite()).sum())
            self.refuse([f"must be finite, got {bad} of {len(counted_N)} values that are not, before training"], "loss")
        if not loss_BP.requires_grad:
            self.refuse(["must have a gradient for what the head reads, or for its parameters"], "loss")

    @torch.no_grad()
    def check_quality(self, modules: tuple[nn.Module, nn.Module], batch: Batch, split: str) -> None:
        """Refuse sums and metrics of an evaluation that cannot be recorded.

        `batch`: a few sequences of the evaluation set. Where they do not suffice, the whole set decides.
        """
        sums = self._compute_sums(modules, batch)
        try:
            self._check_metrics(self._compute_quality(sums))
        except ContractError:  # such as a correlation, which two sequences do not have
            with self.entry.convert_errors(f"eval_batches('{split}')"):
                batches = self.task.eval_batches(split, self.config.train.batch_size)
            of_batches = [self._compute_sums(modules, each) for each in batches]
            sums = {name: torch.stack([each[name] for each in of_batches]).sum(0) for name in of_batches[0]}
            try:
                quality = self._compute_quality(sums)
            except ContractError as error:
                if isinstance(error.__cause__, BUGS):
                    raise
                return  # it may need a trained model
            self._check_metrics(quality)

    def _compute_quality(self, sums: Mapping[str, Tensor]) -> object:
        with self.entry.convert_errors("compute_quality"):
            return self.task.compute_quality(sums)

    def _compute_sums(self, modules: tuple[nn.Module, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """Return the sums over the sequences of each domain."""
        output = self._compute_output(modules, batch)
        size, sums = len(batch.domain_B), {}
        with self.entry.convert_errors("compute_sums"):
            of_sequences = self.task.compute_sums(output, batch)
            items = of_sequences.items()
        for name, value in items:
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != size:
                self.refuse(
                    [f"must return tensors whose first dimension is B={size}, got '{name}': {_describe(value)}"],
                    "compute_sums",
                )
            zeros = torch.zeros(len(self.task.domains), *value.shape[1:], dtype=torch.float64)
            sums[name] = zeros.index_add(0, batch.domain_B, value.double())
        return sums

    def _check_metrics(self, quality: object) -> None:
        metric = self.entry.facts.metric
        if not isinstance(quality, Mapping):
            self.refuse([f"must return metrics by name, got {_describe(quality)}"], "compute_quality")
            return
        for name, value in quality.items():
            if not isinstance(name, str) or not is_valid_metric_name(name):
                self.refuse(
                    [f"must return names of letters, digits and _ - . : / space, got {name!r}"], "compute_quality"
                )
            if not isinstance(value, Real):
                self.refuse([f"must return numbers, got '{name}': {_describe(value)}"], "compute_quality")
        if metric not in quality and type(self.task).probe is Task.probe:
            given = ", ".join(quality) or "nothing"
            self.refuse([f"must return '{metric}', which TaskFacts(metric) names, got {given}"], "compute_quality")


def _are_equal(one: Batch, other: Batch) -> bool:
    """Return whether two batches have the same input, targets and domains; inputs padded to other lengths are equal."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("domain_B", "input_BL", "target_BP")]
    return all(_has_equal_values(a, b) for a, b in pairs if a.shape == b.shape)


def _has_equal_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; NaN, which marks targets that are not counted, is equal to itself."""
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _has_items(value: object) -> bool:
    """Return whether a value has a length and items by index, as sequences of any class have."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, Mapping | Tensor)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return (
        type(value).__name__
        if value is None or not isinstance(value, Sequence)
        else f"{type(value).__name__} of {len(value)}"
    )
