"""The quality of an ensemble of finished runs on the test split, by domain, beside that of each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moebench.analysis.ensemble.mixtures import mix_by_posterior, mix_evenly, select_model
from moebench.analysis.stored_run import StoredRun, find_stored_run
from moebench.analysis.trained_run import TrainedRun, renumber_domains, run_batches
from moebench.config import flatten, to_plain
from moebench.errors import UsageError
from moebench.tasks.language import Language, TextConfig
from moebench.tasks.task import Batch, Task
from moebench.training.model import prepare_task

LABEL, POSTERIOR, EVEN = "label", "posterior", "even"
"""Rows of an ensemble: the run of the domain, the mixture by the posterior, the mean of the probabilities."""


@dataclass(frozen=True, kw_only=True)
class EnsembleMember:
    """One run of an ensemble."""

    run: StoredRun
    domains: tuple[str, ...]
    """Those that it was trained on."""
    flops_per_token: float


@dataclass(frozen=True, kw_only=True)
class EnsembleQuality:
    """Metrics of the runs and of their mixtures."""

    members: tuple[EnsembleMember, ...]
    metric: str
    metrics: dict[str, dict[str, float]]
    """Id of a run, or mixture -> metrics on the test split."""
    posterior: dict[str, list[float]]
    """Domain -> mean posterior of each run over the positions of its test text."""


def measure_ensemble(
    results: Path,
    runs: Sequence[str],
    plugins: Sequence[str] = (),
    report_progress: Callable[[int, int], None] = lambda number, total: None,
) -> EnsembleQuality:
    """Measure finished runs of `language` on one test split, each alone and mixed.

    In domain is what any of them was trained on. Raises UsageError for fewer than two runs, for a run that is not done,
    and for runs that predict other text or other tokens.
    """
    stored = list({run.id: run for run in (find_stored_run(results, name, plugins) for name in runs)}.values())
    if len(stored) < 2:
        raise UsageError(f"ensemble: got the run {stored[0].id} alone (allowed: two runs or more)")
    task = prepare_task(replace(stored[0].config, task=_join_tasks(stored)), results)
    torch.set_num_threads(stored[0].config.train.threads)
    trained = [TrainedRun.from_task(run, prepare_task(run.config, results)) for run in stored]
    members = [_describe_member(run) for run in trained]
    batches = task.eval_batches("test", stored[0].config.train.batch_size)
    sums = _Sums(task, members)
    outputs = [
        run_batches(run.load_model(), enumerate(renumber_domains(batches, task.domains, run.task.domains)), run.config)
        for run in trained
    ]
    for number, (batch, *of_models) in enumerate(zip(batches, *outputs, strict=True), start=1):
        log_p_MBL = torch.stack([-task.loss(output, part).double().cpu() for part, output, _ in of_models])
        sums.add(batch, log_p_MBL)
        report_progress(number, len(batches))
    return EnsembleQuality(
        members=tuple(members), metric="bits_per_byte", metrics=sums.compute_metrics(), posterior=sums.mean_posterior()
    )


def _join_tasks(runs: Sequence[StoredRun]) -> TextConfig:
    """Return the task of all runs together, which holds out what all of them do; raise UsageError for other tasks."""
    tasks = []
    for run in runs:
        if run.folder.state() != "done":
            raise UsageError(f"ensemble: run {run.id} is {run.folder.state()} (allowed: runs that are done)")
        if not isinstance(run.config.task, Language.Config):
            raise UsageError(f"ensemble: run {run.id} is of the task '{run.config.task.name}' (allowed: language)")
        tasks.append(run.config.task)
    held_out = set.intersection(*(set(task.data.held_out_domains) for task in tasks))
    joined = [replace(task, data=replace(task.data, held_out_domains=sorted(held_out))) for task in tasks]
    for run, task in zip(runs, joined, strict=True):
        _require_same_task(runs[0].id, joined[0], run.id, task)
    return joined[0]


def _require_same_task(first_id: str, first: TextConfig, other_id: str, other: TextConfig) -> None:
    """Raise UsageError, with the keys and both values, for another text, other tokens or other windows."""
    theirs, ours = (dict(flatten(to_plain(task), "task.")) for task in (first, other))
    differences = [
        f"{key} is {theirs.get(key)} in run {first_id} and {value} in run {other_id}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differences:
        raise UsageError(
            f"ensemble: {'; '.join(differences)} (allowed: runs whose section task differs in data.held_out_domains"
            " alone)"
        )


def _describe_member(run: TrainedRun) -> EnsembleMember:
    result = run.folder.read_result()
    flops = result.cost.get("flops_per_token", 0.0) if result else 0.0
    domains = run.task.domains[: run.task.num_trained_domains]
    return EnsembleMember(run=run, domains=tuple(domains), flops_per_token=float(flops))


class _Sums:
    """Code lengths and posteriors, added up by domain."""

    def __init__(self, task: Task, members: Sequence[EnsembleMember]) -> None:
        self.task = task
        self.members = members
        self.nats: dict[str, Tensor] = {}
        self.weight_D = torch.zeros(len(task.domains), dtype=torch.float64)
        self.posterior_DM = torch.zeros(len(task.domains), len(members), dtype=torch.float64)
        self.positions_D = torch.zeros(len(task.domains), dtype=torch.float64)
        experts = [[m for m, member in enumerate(members) if domain in member.domains] for domain in task.domains]
        has_experts = all(len(models) == 1 for models in experts[: task.num_trained_domains])
        self.model_D = torch.tensor([models[0] if models else 0 for models in experts]) if has_experts else None
        """The run of each domain, where each domain of training has one; held-out ones have none."""

    def add(self, batch: Batch, log_p_MBL: Tensor) -> None:
        """Add a batch with the log-probability of each target under each model."""
        domain_B = batch.domain_B
        nats_BL, posterior_MBL = mix_by_posterior(log_p_MBL)
        rows = {member.run.id: -log_p for member, log_p in zip(self.members, log_p_MBL, strict=True)}
        rows |= {POSTERIOR: nats_BL, EVEN: mix_evenly(log_p_MBL)}
        is_trained_B = domain_B < self.task.num_trained_domains
        if self.model_D is not None and bool(is_trained_B.all()):
            rows[LABEL] = select_model(log_p_MBL, self.model_D[domain_B])
        for name, nats in rows.items():
            zeros_D = torch.zeros_like(self.weight_D)
            self.nats[name] = self.nats.get(name, zeros_D).index_add(0, domain_B, nats.sum(1))
        self.weight_D.index_add_(0, domain_B, batch.weight_BP.double().sum(1))
        self.posterior_DM.index_add_(0, domain_B, posterior_MBL.sum(2).T)
        self.positions_D.index_add_(0, domain_B, torch.full_like(domain_B, nats_BL.shape[1], dtype=torch.float64))

    def compute_metrics(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each row; those by label cover the domains of training alone."""
        is_held_out_D = torch.arange(len(self.weight_D)) >= self.task.num_trained_domains
        metrics = {}
        for name, nats_D in self.nats.items():
            weight_D = self.weight_D.masked_fill(is_held_out_D, 0) if name == LABEL else self.weight_D
            metrics[name] = self.task.compute_quality({"nats": nats_D, "weight": weight_D})
        return metrics

    def mean_posterior(self) -> dict[str, list[float]]:
        """Return the mean posterior of each run by domain."""
        mean_DM = self.posterior_DM / self.positions_D.clamp(min=1)[:, None]
        return dict(zip(self.task.domains, mean_DM.tolist(), strict=True))
