"""The Python API: one layer, whole experiments, and their results. `import moebench` re-exports it.

Heavy libraries are imported inside the functions that need them.
"""

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.errors import UsageError as UsageError
from moebench.errors import build_unknown_error
from moebench.process_setup import hide_main_module
from moebench.standalone import MoE as MoE
from moebench.standalone import MoERecord as MoERecord
from moebench.standalone import balance_loss as balance_loss
from moebench.standalone import moe_layer as moe_layer

if TYPE_CHECKING:
    import pandas

    from moebench.analysis.compare.values import Comparison, Split
    from moebench.analysis.fairness.values import Fairness
    from moebench.analysis.pooled.pool import Pooled
    from moebench.analysis.transfer.values import Transfer
    from moebench.experiment.grid import Experiment
    from moebench.experiment.runner import RunReport
    from moebench.runs.folder import RunFolder
    from moebench.tasks.task import Task
    from moebench.training.model import Model

DEFAULT_BASELINE = "dense"
SPLITS = ("test", "validation")


def load_experiment(
    path_or_name: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str | Path] = ()
) -> "Experiment":
    """Read an experiment, by its file or its name (see `moebench list experiments`), and check every cell.

    `overrides`: changes in the form `key=value`, as on the command line. `plugins`: Python files that register
    routers, layouts or tasks. Raises UsageError for anything that could not be trained.
    """
    from moebench.experiment.files import find_experiment
    from moebench.experiment.grid import expand

    return expand(find_experiment(str(path_or_name)), list(overrides), [str(plugin) for plugin in plugins])


def run(
    experiment: "Experiment | str | Path",
    results: str | Path = "results",
    *,
    jobs: int = 0,
    tracker: str | None = None,
    retries: int = 0,
    quiet: bool = False,
) -> "RunReport":
    """Train every cell of an experiment that is not done, as `moebench run` does, and report what happened.

    Each cell trains in its own process; a failed cell is listed in `report.failed`, and the others continue. `jobs`:
    cells at a time; 0: as many as fit the machine. `tracker`: MLflow URI, "none" for no tracker, None for SQLite in
    the results folder. `retries`: how often a failed cell is tried again. `quiet`: print no progress. After Ctrl-C it
    saves checkpoints and raises KeyboardInterrupt, after SIGTERM SystemExit. Works in the main thread only.
    """
    from moebench.analysis.figures import Figures
    from moebench.experiment.phases import run_phases
    from moebench.experiment.run_setup import RunOptions, RunSetup
    from moebench.launch.launcher import LocalLauncher
    from moebench.reporting.streams import open_stderr_console

    setup = RunSetup(
        results=Path(results),
        options=RunOptions(jobs=jobs, tracker=tracker, retries=retries),
        launcher=LocalLauncher(),
        console=open_stderr_console(quiet=quiet),
        figures=Figures(),
    )
    with hide_main_module():
        report = run_phases(_as_experiment(experiment), setup)
    if report.interrupted:
        raise KeyboardInterrupt if report.interrupted == signal.SIGINT else SystemExit(128 + report.interrupted)
    return report


def compare(
    runs: "Experiment | str | Path | Iterable[str]",
    results: str | Path = "results",
    *,
    baseline: str | None = None,
    split: "Split" = "test",
    allow_mismatch: bool = False,
    margin: float | None = None,
) -> "Comparison":
    """Compare arms with a baseline over paired seeds, as `moebench compare` does.

    `runs`: an experiment, its file or name, or ids of runs (a column of `load_runs`). `baseline`: an arm; None takes
    that of the experiment, or "dense" among runs. `split`: "test" or "validation". `allow_mismatch`: give arms of
    unequal cost a verdict. `margin`: the share of the baseline's mean below which arms are equivalent; None takes that
    of the experiment, 0.01. The value has `to_dict()`; `to_text` makes tables of it.

    Ids of runs have no planned seeds: their verdicts are at the full level, also at an early look or after seeds were
    added (docs/statistics.md).
    """
    from dataclasses import replace

    from moebench.analysis.compare.experiment import compare_experiment
    from moebench.experiment.grid import Experiment
    from moebench.schema import DEFAULT_MARGIN, check_margin

    if margin is not None:
        check_margin(margin, "margin")
    if split not in SPLITS:
        raise build_unknown_error("split", split, SPLITS)
    if not isinstance(runs, Experiment | str | Path):
        share = DEFAULT_MARGIN if margin is None else margin
        return _compare_runs(list(runs), Path(results), baseline, split, allow_mismatch=allow_mismatch, margin=share)
    experiment = _find_trained(runs, Path(results))
    if baseline is not None:
        experiment = replace(experiment, baseline=baseline)
    return compare_experiment(experiment, Path(results), allow_mismatch=allow_mismatch, split=split, margin=margin)


def measure_fairness(
    experiment: "Experiment | str | Path", results: str | Path = "results", *, allow_mismatch: bool = False
) -> "Fairness":
    """Compare the arms of an experiment at equal tokens, FLOPs, parameters and time, on the validation split.

    `allow_mismatch`: state times that were not measured under the same conditions, too. The value has `to_dict()`.
    """
    from moebench.analysis.compare.experiment import compare_experiment
    from moebench.analysis.fairness.experiment import measure_experiment
    from moebench.analysis.fairness.measure import compare_on_axes

    trained = _find_trained(experiment, Path(results))
    comparison = compare_experiment(trained, Path(results), allow_mismatch=allow_mismatch)
    return compare_on_axes(measure_experiment(trained, Path(results), comparison), ignore_conditions=allow_mismatch)


def measure_transfer(experiment: "Experiment | str | Path", results: str | Path = "results") -> "Transfer | None":
    """Return what the arms of an experiment gain on the data that they are adapted to, and what they forget.

    For experiments whose arms start from runs on other data (`stages`); None where no arm does. The value has
    `to_dict()`.
    """
    from moebench.analysis.transfer.experiment import measure_transfer as measure

    return measure(_find_trained(experiment, Path(results)), Path(results))


def pool(
    experiments: "Iterable[Experiment | str | Path]",
    results: str | Path = "results",
    *,
    split: "Split" = "test",
    allow_mismatch: bool = False,
) -> "Pooled":
    """Pool several experiments that share arms and the baseline, as `moebench compare` does when given several."""
    from moebench.analysis.pooled.experiments import pool_experiments

    if split not in SPLITS:
        raise build_unknown_error("split", split, SPLITS)
    trained = [_find_trained(experiment, Path(results)) for experiment in experiments]
    if len(trained) < 2:
        raise UsageError(f"pool: got {len(trained)} experiments (allowed: at least 2; `compare` takes one)")
    return pool_experiments(trained, Path(results), allow_mismatch=allow_mismatch, split=split)


def to_text(comparison: "Comparison | Pooled", width: int = 100) -> str:
    """Return the tables of a comparison, or of pooled experiments, as plain text, `width` columns wide."""
    import io

    from moebench.analysis.compare.report import build_report
    from moebench.analysis.pooled.pool import Pooled
    from moebench.analysis.pooled.report import build_pooled_report
    from moebench.reporting.console import SafeConsole

    report = build_pooled_report(comparison) if isinstance(comparison, Pooled) else build_report(comparison)
    stream = io.StringIO()
    SafeConsole(file=stream, width=width, color_system=None).print(report.to_rich())
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def load_runs(results: str | Path = "results") -> "pandas.DataFrame":
    """Return a DataFrame with one row for each run in a results folder.

    Columns: id, experiment, arm, seed, status, error; each setting by its key (`train.steps`, `router.name`); final
    metrics as `test/METRIC` and `validation/METRIC`; `cost/...` and `throughput/...`. What a run does not have is NaN.
    A run whose files are damaged has the status "damaged" and the reason in `error`.
    """
    import pandas

    from moebench.runs.folder import list_run_folders
    from moebench.runs.table import CELL_COLUMNS, describe_run

    rows = [describe_run(folder) for folder in list_run_folders(Path(results))]
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=[*CELL_COLUMNS, "status", "error"])


def load_model(
    run: str | Path, results: str | Path = "results", plugins: Sequence[str | Path] = ()
) -> "tuple[Model, Task]":
    """Return the trained model of a run, in eval mode on the CPU, and its task.

    `run`: the folder of a run, or the beginning of its id in `results`. The weights are those of the last checkpoint.
    "hf:PATH" is a folder of transformers or of `moebench export`; a model of transformers gets the task `language` on
    the embedded text, encoded by its own tokenizer.
    `plugins`: the plug-in files that the run needs, unless they are loaded already; those that its folder names are not
    executed by themselves, because the folder may come from someone else. Raises UsageError for an unknown run, for a
    plug-in that is not given, where no checkpoint can be read, and where the data was changed since.
    """
    from moebench.config import resolve
    from moebench.launch.cell_check import require_unchanged_data
    from moebench.registry import load_plugin, require_plugins
    from moebench.training.model import prepare_task
    from moebench.training.parent_model import load_pretrained
    from moebench.training.trained_model import load_trained_model

    if str(run).startswith("hf:"):
        return load_pretrained(str(run), Path(results), plugins)
    folder = _find_run(run, Path(results))
    cell = folder.read_cell()
    for plugin in plugins:
        load_plugin(str(plugin))
    require_plugins(cell["plugins"], cell.get("plugin_digests") or (), f"run {folder.path.name}")
    config = resolve(cell["config"])
    require_unchanged_data(cell, config)
    task = prepare_task(config, folder.path.parent.parent)
    return load_trained_model(config, config, task, folder).eval(), task


def _as_experiment(experiment: "Experiment | str | Path") -> "Experiment":
    return load_experiment(experiment) if isinstance(experiment, str | Path) else experiment


def _find_trained(experiment: "Experiment | str | Path", results: Path) -> "Experiment":
    """Return an experiment, with the seeds that were added to it in a results folder where it is read."""
    from moebench.experiment.files import find_experiment
    from moebench.experiment.grid import expand

    if isinstance(experiment, str | Path):
        return expand(find_experiment(str(experiment)), finished_in=results)
    return experiment


def _compare_runs(
    ids: Sequence[str], results: Path, baseline: str | None, split: "Split", *, allow_mismatch: bool, margin: float
) -> "Comparison":
    from dataclasses import replace

    from moebench.analysis.compare.comparison import compare as compare_results
    from moebench.analysis.compare.values import ComparisonMetric
    from moebench.experiment.trivial_baselines import find_baselines_of_runs
    from moebench.tasks.task import TASKS

    if not ids:
        raise UsageError("compare: got no run (allowed: an experiment, or ids of runs)")
    folders = [_find_run(run_id, results) for run_id in ids]
    cells = [folder.read_cell() for folder in folders]
    arms = [cell["arm"] for cell in cells]
    facts = TASKS.get(cells[0]["config"]["task"]["name"]).facts
    run_results = [result for folder in folders if (result := folder.read_result()) is not None]
    comparison = compare_results(
        run_results,
        expected=[(cell["arm"], cell["seed"], cell["id"]) for cell in cells],
        baseline=baseline or (DEFAULT_BASELINE if DEFAULT_BASELINE in arms else arms[0]),
        metric=ComparisonMetric(name=facts.metric, lower_is_better=facts.lower_is_better, split=split, margin=margin),
        allow_mismatch=allow_mismatch,
    )
    trivial = find_baselines_of_runs(cells, run_results, comparison.baseline, results, split)
    return replace(comparison, trivial_baselines=trivial.baselines, trivial_problem=trivial.problem)


def _find_run(run: str | Path, results: Path) -> "RunFolder":
    from moebench.runs.find_run import find_run
    from moebench.runs.folder import RunFolder

    return RunFolder(Path(run)) if (Path(run) / "cell.json").is_file() else find_run(results, str(run))
