"""Tasks by name: generated from the test split, in a local folder, or in lm-eval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moebench.analysis.benchmarks.passages import PASSAGE_TASKS, TestPassages
from moebench.analysis.benchmarks.records import digest_values
from moebench.analysis.benchmarks.task_files import TaskFile, list_task_files
from moebench.errors import UsageError, suggest

FIRST_VERSION = (0, 4, 12)
"""Of lm-eval. Earlier ones load tasks by another interface."""
NOT_IN_DIGEST = ("metadata", "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "num_fewshot", "task")
"""Settings of a task that say where its items are: the items themselves count."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks are read and presented."""

    include: Path | None = None
    """A folder of task files."""
    allows_code: bool = False
    shots: int | None = None
    """Solved examples in the context; None: what the task says."""
    seed: int = 0
    """Chooses the examples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchmarkTask:
    """A task of lm-eval with its items loaded."""

    name: str
    task: Any
    """lm-eval's object."""
    settings: Mapping[str, Any]
    """What determines the results of a model."""
    higher_is_better: Mapping[str, bool]
    """Metric -> direction; the first metric is the one that arms are compared by."""


def require_harness() -> None:
    """Raise UsageError, with the command that installs it, where lm-eval is missing or too old."""
    least = ".".join(map(str, FIRST_VERSION))
    try:
        installed = version("lm_eval")
    except PackageNotFoundError as error:
        raise UsageError(f"evaluate: needs lm_eval>={least} (pip install 'moebench[eval]')") from error
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdecimal()) < FIRST_VERSION:
        raise UsageError(
            f"evaluate: needs lm_eval>={least}, and {installed} is installed (pip install 'moebench[eval]')"
        )


def load_tasks(
    names: Sequence[str], options: TaskOptions, read_text: Callable[[], TestPassages]
) -> list[BenchmarkTask]:
    """Return the tasks with these names; a group of lm-eval stands for its tasks.

    `read_text`: the passages that some tasks are made of. Raises UsageError for an unknown name, with the nearest one,
    and for data that cannot be loaded.
    """
    require_harness()
    local = list_task_files(options.include, allows_code=options.allows_code) if options.include else {}
    built: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name in PASSAGE_TASKS:
            config, build = PASSAGE_TASKS[name]
            config = {**config, "test_split": "test"}
            file = TaskFile(name=name, path=Path(name), config=config, rows={"test": build(read_text())})
            built[name] = _build_local(file)
        elif name in local:
            built[name] = _build_local(local[name])
        else:
            built |= _load_from_library(name, local)
    return [_prepare(name, task, options) for name, task in built.items()]


def _build_local(file: TaskFile) -> Any:
    """Return lm-eval's object for a task file."""
    from lm_eval.api.task import ConfigurableTask

    from moebench.analysis.benchmarks.harness import describe_error, quiet_harness

    config: dict[str, Any] = {**file.config, "task": file.name, "metadata": {"version": 0}}
    if file.rows is not None:
        config |= {"custom_dataset": _build_loader(file.rows), "dataset_path": None, "dataset_kwargs": None}
    for key in ("tag", "group"):
        config.pop(key, None)
    try:
        with quiet_harness():
            return ConfigurableTask(config=config)
    except Exception as error:  # of many kinds: templates, missing splits and columns, unknown filters
        raise UsageError(f"{file.path}: lm-eval cannot build this task ({describe_error(error)})") from error


def _build_loader(rows: Mapping[str, list[dict[str, Any]]]) -> Callable[..., dict[str, Any]]:
    def load(**_: Any) -> dict[str, Any]:
        import datasets

        return {split: datasets.Dataset.from_list(items) for split, items in rows.items()}

    return load


def _load_from_library(name: str, local: Mapping[str, TaskFile]) -> dict[str, Any]:
    """Return the tasks that a name of lm-eval stands for."""
    from moebench.analysis.benchmarks.harness import describe_error, quiet_harness

    with quiet_harness():
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
    if name not in manager.task_index:
        near = suggest(name, [*local, *PASSAGE_TASKS, *manager.all_tasks])
        names = ", ".join([*local, *PASSAGE_TASKS])
        raise UsageError(
            f"--tasks: '{name}' is unknown.{near} Allowed: {names}, and the tasks of lm-eval (lm-eval ls tasks)"
        )
    try:
        with quiet_harness():
            tasks: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # of many kinds: no network, a gated data set, a library that the task needs
        raise UsageError(
            f"--tasks: '{name}' cannot be loaded ({describe_error(error)}); without a network: --include DIR, or"
            f" {', '.join(PASSAGE_TASKS)}"
        ) from error
    return tasks


def _prepare(name: str, task: Any, options: TaskOptions) -> BenchmarkTask:
    """Set the number of examples as lm-eval's own command does, and describe the task."""
    if task.OUTPUT_TYPE is None or getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name}: has images or sound (allowed: tasks on text)")
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name}: runs the code that a model writes (allowed: tasks that compare texts)")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=options.shots or 0)
    elif options.shots is not None and task.get_config("num_fewshot") != 0:  # lm-eval keeps a 0 of the task, too
        task.set_config(key="num_fewshot", value=options.shots)
    shots = task.get_config("num_fewshot")
    config = {key: value for key, value in task.dump_config().items() if key not in NOT_IN_DIGEST}
    settings = {
        "config": digest_values(config),
        "items": digest_values([dict(doc) for doc in task.eval_docs]),
        "shots": shots,
        "lm_eval": version("lm_eval"),
    }
    if shots:
        examples = task.fewshot_docs() or task.eval_docs
        settings |= {"examples": digest_values([dict(doc) for doc in examples]), "seed": options.seed}
    return BenchmarkTask(name=name, task=task, settings=settings, higher_is_better=_read_directions(task))


def _read_directions(task: Any) -> dict[str, bool]:
    return {str(name): bool(is_better) for name, is_better in task.higher_is_better().items() if is_better is not None}
