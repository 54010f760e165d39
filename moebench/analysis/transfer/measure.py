"""The metrics of a run and its parent on the same test text: from their results, else by evaluating their models."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebench.analysis.stored_run import StoredRun, read_run
from moebench.analysis.trained_run import TrainedRun, renumber_domains, run_batches
from moebench.analysis.training_flops import compute_training_flops
from moebench.analysis.transfer.evaluation_text import EvaluationText, read_evaluation_text
from moebench.errors import UsageError
from moebench.init_config import Parent
from moebench.models.storageless import build_without_storage
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.tasks.cache import load_or_create
from moebench.tasks.task import TASKS, Task
from moebench.training.evaluation import training_precision
from moebench.training.model import prepare_task


@dataclass(frozen=True, kw_only=True)
class RunTransfer:
    """A run beside its parent, on the test text of the target and of the sources."""

    seed: int
    target: tuple[str, ...]
    """Domains that the run was trained on and its parent was not; all of its own where there is none."""
    sources: tuple[str, ...]
    """Domains that the parent was trained on, without the target."""
    parent_target: float
    child_target: float
    parent_source: float | None
    """None where the target is all that the parent was trained on."""
    child_source: float | None
    parent_domains: Mapping[str, float]
    """Metric of each domain that both were measured on."""
    child_domains: Mapping[str, float]
    train_flops: tuple[float, float]
    """FLOPs of training, of the parent and of the run."""
    train_s: tuple[float, float]


class TransferReader:
    """Reads pairs of runs; tasks are prepared once."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._tasks: dict[str, tuple[Task, EvaluationText]] = {}

    def read(self, child_id: str) -> RunTransfer | None:
        """Return a finished run beside its parent; None where its only parent is no finished run, or has its data.

        Raises UsageError for a damaged run.
        """
        child = read_run(RunFolder.of(self.results, child_id))
        parents = child.config.init.parents
        if len(parents) != 1 or parents[0].kind != "run" or parents[0].step is not None:
            return None
        parent = self._read_parent(parents[0])
        if parent is None or parent.config.task.name != child.config.task.name:
            return None
        results = [run.folder.read_result() for run in (parent, child)]
        if any(result is None or result.status != "done" for result in results):
            return None
        (_, parent_text), (_, child_text) = self._open(parent), self._open(child)
        if _have_equal_training_domains(parent_text, child_text):
            return None
        return self._pair(parent, child, results)

    def _read_parent(self, parent: Parent) -> StoredRun | None:
        folder = RunFolder.of(self.results, parent.name)
        return read_run(folder) if folder.cell.exists() else None

    def _open(self, run: StoredRun) -> tuple[Task, EvaluationText]:
        key = repr(run.config.task)
        if key not in self._tasks:
            task = prepare_task(run.config, self.results)
            self._tasks[key] = (task, read_evaluation_text(task))
        return self._tasks[key]

    def _pair(self, parent: StoredRun, child: StoredRun, results: Sequence[Any]) -> RunTransfer:
        (_, parent_text), (_, child_text) = self._open(parent), self._open(child)
        old = [domain for domain in child_text.trained if domain in parent_text.trained]
        old = [domain for domain in old if parent_text.has(child_text, domain)]
        target = tuple(domain for domain in child_text.trained if domain not in old) or child_text.trained
        same = [domain for domain in parent_text.trained if child_text.has(parent_text, domain)]
        sources = tuple(domain for domain in parent_text.trained if not (domain in same and domain in target))
        parent_result, child_result = results
        on_target = [
            child_text.average(self._measure(run, result, child, target), target)
            for run, result in ((parent, parent_result), (child, child_result))
        ]
        on_sources = [
            parent_text.average(self._measure(run, result, parent, sources), sources) if sources else None
            for run, result in ((parent, parent_result), (child, child_result))
        ]
        common = [domain for domain in parent_text.domains if child_text.has(parent_text, domain)]
        return RunTransfer(
            seed=child.seed,
            target=target,
            sources=sources,
            parent_target=on_target[0] or 0.0,
            child_target=on_target[1] or 0.0,
            parent_source=on_sources[0],
            child_source=on_sources[1],
            parent_domains=_select(parent_result, _metric_of(parent), common),
            child_domains=_select(child_result, _metric_of(child), common),
            train_flops=(compute_training_flops(parent_result) or 0.0, compute_training_flops(child_result) or 0.0),
            train_s=tuple(float(result.throughput.get("train_s", 0.0)) for result in results),  # type: ignore[arg-type]
        )

    def _measure(
        self, run: StoredRun, result: RunResult, owner: StoredRun, domains: Sequence[str]
    ) -> Mapping[str, float]:
        """Return the metric of a run by domain, on the test text of the task of `owner`."""
        (_, text), (task, owner_text) = self._open(run), self._open(owner)
        metric = _metric_of(run)
        if all(text.has(owner_text, domain) for domain in domains):
            return _select(result, metric, domains)
        return _select_values(self._evaluate(run, owner, task), metric, domains)

    def _evaluate(self, run: StoredRun, owner: StoredRun, task: Task) -> Mapping[str, float]:
        """Return the metrics of a run on the test split of another one's task, from the cache where it has them."""
        key = hashlib.sha256(f"domains by name {run.id} {task.digest} {task.eval_digest}".encode()).hexdigest()[:24]
        trained = TrainedRun.from_task(run, self._open(run)[0])

        def create() -> tuple[dict[str, Any], dict[str, Any]]:
            return {"metrics": evaluate_on(trained, owner.id, task)}, {}

        metrics: Mapping[str, float] = load_or_create(self.results / "cache" / f"transfer-{key}", create)[0]["metrics"]
        return metrics


def evaluate_on(run: TrainedRun, owner_id: str, task: Task) -> dict[str, float]:
    """Return the metrics of a trained model on the test split of the task of another run.

    The model is that of the run's own task: tables and experts of domains are those that it was trained with, and
    domains have its numbers. Raises UsageError where the model does not fit the task.
    """
    d_model = run.config.model.d_model
    with build_without_storage():
        here, there = (
            _list_shapes(each.build_embedding(d_model), each.build_head(d_model)) for each in (run.task, task)
        )
    if here != there:
        raise UsageError(
            f"run {run.id} cannot be evaluated on the data of run {owner_id}: embedding and head have the shapes {here}"
            f" and {there}"
        )
    torch.set_num_threads(run.config.train.threads)
    model, batches = run.load_model(), task.eval_batches("test", run.config.train.batch_size)
    renumbered = renumber_domains(batches, task.domains, run.task.domains)
    sums: dict[str, Tensor] = {}
    with training_precision(run.config.train, run.device), torch.no_grad():
        outputs = run_batches(model, enumerate(renumbered), run.config)
        for batch, (_, output, _) in zip(batches, outputs, strict=True):
            part = batch.to(run.device)
            for name, value in task.compute_sums(output, part).items():
                zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64, device=value.device)
                sums[name] = sums.get(name, zeros).index_add(0, part.domain_B, value.double())
    return task.compute_quality({name: value.cpu() for name, value in sums.items()})


def _list_shapes(*modules: nn.Module) -> list[list[int]]:
    return [list(parameter.shape) for module in modules for parameter in module.parameters()]


def _have_equal_training_domains(first: EvaluationText, second: EvaluationText) -> bool:
    same = [domain for domain in first.trained if second.has(first, domain)]
    return set(first.trained) == set(second.trained) == set(same)


def _metric_of(run: StoredRun) -> str:
    return TASKS.get(run.config.task.name).facts.metric


def _select(result: RunResult, metric: str, domains: Sequence[str]) -> dict[str, float]:
    return _select_values(result.metrics, metric, domains)


def _select_values(metrics: Mapping[str, float], metric: str, domains: Sequence[str]) -> dict[str, float]:
    names = {domain: f"{metric}/{domain}" for domain in domains}
    missing = [name for name in names.values() if name not in metrics]
    if missing:
        raise UsageError(f"transfer: a run has no test metric '{missing[0]}'; train it again")
    return {domain: metrics[name] for domain, name in names.items()}
