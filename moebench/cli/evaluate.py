"""`moebench evaluate`: finished runs, and models of transformers, on tasks of lm-eval and local ones."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Overrides, Plugins, Results, Size, add_size
from moebench.cli.output import make_console, print_report
from moebench.cli.subjects import SUFFIXES
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment, list_experiments

if TYPE_CHECKING:
    from moebench.analysis.benchmarks.measure import EvaluationOptions
    from moebench.reporting.report import Report

PRETRAINED_PREFIX = "hf:"
DEFAULT_TASKS = "moebench_cloze,moebench_text"

Subject = Annotated[
    str,
    typer.Argument(
        metavar="RUN|EXPERIMENT|hf:PATH",
        help="The beginning of a run's id, an experiment, or a local folder with a model of transformers.",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks", help="Tasks with commas between them: of lm-eval, of --include, or made from the test split."
    ),
]
Include = Annotated[
    Path | None, typer.Option("--include", help="Folder of task files in lm-eval's YAML form, with JSON lines.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the code that task files of --include name (`!function`).")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="The first items of each task alone.")]
Shots = Annotated[
    int | None, typer.Option("--shots", min=0, help="Solved examples in the context; else as the task says.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time. No result depends on it.")]
Seed = Annotated[int, typer.Option("--seed", help="Chooses the solved examples.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="hf:PATH: float32, bfloat16, float16, or auto: as the weights are stored.")
]
SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", min=2, help="hf:PATH: tokens at once; else what the model allows.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="hf:PATH: text of the tasks of passages; else the embedded text."),
]


def evaluate(
    subject: Subject,
    overrides: Overrides = None,
    tasks: Tasks = DEFAULT_TASKS,
    include: Include = None,
    allow_code: AllowCode = False,
    limit: Limit = None,
    shots: Shots = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    sequence_length: SequenceLength = None,
    data: Data = None,
    size: Size = None,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = False,
) -> None:
    """Evaluate trained models on tasks through lm-eval, and compare the arms of an experiment item by item.

    Results by item are stored beside each run, and what is stored is not computed again. Without --tasks, tasks are
    made from the test split: choose the true continuation of a passage, and bits per byte. Nothing is downloaded for
    these, nor for task files in a folder.
    """
    kind = _select_kind(subject)
    _check_options(kind, overrides=overrides, size=size, dtype=dtype, sequence_length=sequence_length, data=data)
    from moebench.analysis.benchmarks.measure import EvaluationOptions
    from moebench.analysis.benchmarks.tasks import TaskOptions

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UsageError("--tasks: names no task (allowed: names with commas between them)")
    options = EvaluationOptions(
        tasks=names,
        reading=TaskOptions(include=include, allows_code=allow_code, shots=shots, seed=seed),
        limit=limit,
        batch_size=batch_size,
        on_progress=_make_progress(),
    )
    if kind == "pretrained":
        report = _report_pretrained(subject, results, options, dtype, sequence_length, data)
    elif kind == "experiment":
        report = _report_experiment(subject, add_size(overrides, size), plugin or (), results, options)
    else:
        report = _report_run(subject, plugin or (), results, options)
    print_report(report, json=json, markdown=markdown)


def _select_kind(subject: str) -> str:
    if subject.startswith(PRETRAINED_PREFIX):
        return "pretrained"
    is_experiment = subject.endswith(SUFFIXES) or "/" in subject or subject in list_experiments()
    return "experiment" if is_experiment else "run"


def _check_options(kind: str, **given: object) -> None:
    """Raise UsageError for an option that is for another kind of subject."""
    defaults = {"dtype": "auto"}
    named = {"overrides": "KEY=VALUE", "size": "--size", "sequence_length": "--sequence-length"}
    for name, value in given.items():
        owner = "experiment" if name in ("overrides", "size") else "pretrained"
        if value and value != defaults.get(name) and kind != owner:
            wanted = "an experiment" if owner == "experiment" else "hf:PATH"
            raise UsageError(f"{named.get(name, f'--{name}')}: applies to {wanted}")


def _make_progress() -> "_Progress":
    return _Progress()


class _Progress:
    """Prints the number of finished requests on standard error, whose redirection hides lm-eval's own bars."""

    def __init__(self) -> None:
        from moebench.cli.output import print_progress

        self._show = print_progress("requests")
        self._stream = sys.stderr

    def __call__(self, subject: str, number: int, total: int) -> None:
        import contextlib

        with contextlib.redirect_stderr(self._stream):
            self._show(number, total, subject)


def _report_pretrained(
    subject: str,
    results: Path,
    options: "EvaluationOptions",
    dtype: str,
    max_length: int | None,
    data: str | None,
) -> "Report":
    from moebench.analysis.benchmarks.measure import Benchmarks
    from moebench.analysis.benchmarks.report import build_model_report

    evaluated = Benchmarks(options).evaluate_pretrained(subject, results, dtype=dtype, max_length=max_length, data=data)
    return build_model_report(evaluated, ())


def _report_run(
    subject: str, plugins: "list[str] | tuple[str, ...]", results: Path, options: "EvaluationOptions"
) -> "Report":
    from moebench.analysis.benchmarks.measure import Benchmarks
    from moebench.analysis.benchmarks.report import build_model_report
    from moebench.analysis.stored_run import find_stored_run

    run, benchmarks = find_stored_run(results, subject, plugins), Benchmarks(options)
    evaluated = benchmarks.evaluate_run(run, results)
    return build_model_report(evaluated, benchmarks.compute_references(run, results))


def _report_experiment(
    subject: str,
    overrides: list[str],
    plugins: "list[str] | tuple[str, ...]",
    results: Path,
    options: "EvaluationOptions",
) -> "Report":
    from moebench.analysis.benchmarks.experiment import evaluate_experiment
    from moebench.analysis.benchmarks.report import build_experiment_report
    from moebench.experiment.grid import expand

    console = make_console(stderr=True)
    experiment = expand(find_experiment(subject), overrides, plugins, finished_in=results)
    evaluation = evaluate_experiment(
        experiment,
        results,
        options,
        report_progress=lambda line: console.print(line, highlight=False, markup=False),
    )
    return build_experiment_report(evaluation)
