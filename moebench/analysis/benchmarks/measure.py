"""Evaluate a run or a model of transformers on tasks; stored responses are not computed again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moebench.analysis.benchmarks.passages import PASSAGE_TASKS, TestPassages
from moebench.analysis.benchmarks.pretrained_model import PretrainedTokenModel
from moebench.analysis.benchmarks.records import EvaluationRecord, open_record
from moebench.analysis.benchmarks.results import TaskResult
from moebench.analysis.benchmarks.run_model import RunModel, require_scorable
from moebench.analysis.benchmarks.tasks import BenchmarkTask, TaskOptions, load_tasks, require_harness
from moebench.analysis.benchmarks.text_model import TextModel
from moebench.analysis.benchmarks.unigram import UnigramModel
from moebench.analysis.stored_run import StoredRun
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.pretrained.folder import PretrainedFolder, open_pretrained
from moebench.tasks.language import Language
from moebench.tasks.text.sources import TextDataConfig
from moebench.tasks.text.windows import prepare
from moebench.training.model import prepare_task

EVALUATIONS = "evaluations"
"""Folder of the records: beside a run, and of models of transformers in the results folder."""
REFERENCE = "unigram"


def _ignore(subject: str, number: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated and how."""

    tasks: tuple[str, ...]
    reading: TaskOptions = field(default_factory=TaskOptions)
    limit: int | None = None
    """The first items of each task alone; None: all."""
    batch_size: int = 16
    """Sequences that are in the model at a time; no result depends on it."""
    on_progress: Callable[[str, int, int], None] = _ignore
    """Called with what is evaluated and on which task, the number of requests that are done, and that of all."""


class Benchmarks:
    """The tasks of a command, read once for each text that they are made of."""

    def __init__(self, options: EvaluationOptions) -> None:
        require_harness()
        self.options = options
        self._tasks: dict[str, list[BenchmarkTask]] = {}
        self._references: dict[tuple[str, str], TaskResult] = {}

    def list_tasks(self, digest: str, read_text: Callable[[], TestPassages]) -> list[BenchmarkTask]:
        """Return the tasks; those that are made of passages, of a text with this digest."""
        key = digest if any(name in PASSAGE_TASKS for name in self.options.tasks) else ""
        if key not in self._tasks:
            self._tasks[key] = load_tasks(self.options.tasks, self.options.reading, read_text)
        return self._tasks[key]

    def evaluate_run(self, stored: StoredRun, results: Path) -> list[TaskResult]:
        """Return the results of a finished run; raise UsageError for one that gives no probability of a text."""
        try:
            require_scorable(stored.config)
        except UsageError as error:
            raise UsageError(f"run {stored.id}: {error}") from error
        if stored.folder.state() != "done":
            raise UsageError(f"run {stored.id}: is {stored.folder.describe_state()} (allowed: a run that is done)")
        run = TrainedRun.from_task(stored, prepare_task(stored.config, results))
        assert isinstance(run.task, Language)
        tasks = self.list_tasks(run.task.digest, partial(TestPassages, text=run.task.text))
        models: list[TextModel] = []

        def load() -> TextModel:
            if not models:
                models.append(TextModel(RunModel.load(run), self.options.batch_size))
            return models[0]

        folder = run.folder.path / EVALUATIONS
        name, settings = f"{stored.arm}, seed {stored.seed}", {"length": run.task.sequence_length}
        return [self._evaluate(task, run.id, folder, load, settings, name) for task in tasks]

    def compute_references(self, stored: StoredRun, results: Path) -> list[TaskResult]:
        """Return what token frequencies of the training split alone reach on the tasks that ask for probabilities."""
        run_task = prepare_task(stored.config, results)
        assert isinstance(run_task, Language)
        model = TextModel(UnigramModel(run_task), self.options.batch_size)
        computed = []
        for task in self.list_tasks(run_task.digest, partial(TestPassages, text=run_task.text)):
            if task.task.OUTPUT_TYPE == "generate_until":
                continue
            key = task.name, run_task.digest
            if key not in self._references:
                record = EvaluationRecord(path=Path(), header={})
                self._references[key] = self._run_task(task, REFERENCE, record, lambda: model, REFERENCE)
            computed.append(self._references[key])
        return computed

    def evaluate_pretrained(
        self, subject: str, results: Path, *, dtype: str, max_length: int | None, data: str | None
    ) -> list[TaskResult]:
        """Return the results of the model in the folder that `hf:PATH` names.

        `data`: text that tasks of passages are made of; None: the embedded text.
        """
        folder = open_pretrained(subject, requires_experts=False)
        text = TextDataConfig(path=data, tokenizer="bytes")
        read_text = partial(_read_passages, text, results / "cache")
        tasks = self.list_tasks(str(data), read_text)
        models: list[TextModel] = []

        def load() -> TextModel:
            if not models:
                model = PretrainedTokenModel(folder, dtype, max_length)
                models.append(TextModel(model, self.options.batch_size))
            return models[0]

        name = f"{folder.path.resolve().name}-{folder_digest(folder)}"
        settings = {"dtype": dtype, "length": max_length}
        return [self._evaluate(task, name, results / EVALUATIONS / name, load, settings, subject) for task in tasks]

    def _evaluate(
        self,
        task: BenchmarkTask,
        subject: str,
        folder: Path,
        load: Callable[[], TextModel],
        settings: Mapping[str, object],
        name: str,
    ) -> TaskResult:
        with open_record(folder, subject, task.name, {**task.settings, **settings}) as record:
            result = self._run_task(task, subject, record, load, name)
            record.append_items(result.items)
        return result

    def _run_task(
        self, task: BenchmarkTask, subject: str, record: EvaluationRecord, load: Callable[[], TextModel], name: str
    ) -> TaskResult:
        from moebench.analysis.benchmarks.harness import HarnessModel, evaluate_task

        model = HarnessModel(load, record, partial(self.options.on_progress, f"{name}, {task.name}"))
        items, metrics = evaluate_task(
            model, task.task, task.name, limit=self.options.limit, seed=self.options.reading.seed
        )
        return TaskResult(
            subject=subject,
            task=task.name,
            items=tuple(items),
            metrics=_order_metrics(metrics, task.higher_is_better),
            higher_is_better=task.higher_is_better,
            file=str(record.path) if record.header else "",
        )


def _order_metrics(metrics: Mapping[str, float], declared: Mapping[str, bool]) -> dict[str, float]:
    """Return the metrics in the order in which the task declares them."""
    rank = {name: number for number, name in enumerate(declared)}
    return dict(sorted(metrics.items(), key=lambda item: rank.get(item[0].partition(",")[0], len(rank))))


def _read_passages(text: TextDataConfig, cache: Path) -> TestPassages:
    return TestPassages(text=prepare(text, cache, 1))


def folder_digest(folder: PretrainedFolder) -> str:
    """Return a digest (12 hex digits) of the files that determine what a model of transformers computes."""
    digest = hashlib.sha256()
    names = {folder.path / "config.json", folder.path / "tokenizer.json", *(t.file for t in folder.tensors.values())}
    for file in sorted(map(str, names)):
        digest.update(Path(file).name.encode())
        if Path(file).exists():
            with open(file, "rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:12]
