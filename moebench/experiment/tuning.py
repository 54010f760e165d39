"""What each arm chooses: the trial with the best validation metric, a function of the results of the tuning runs.

It is computed from the results alone, so that several runners of one grid make the same choice. A trial with a run that
failed or diverged is worse than every other one; of equal trials the first in the order of the grid is chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.trials import ArmTuning, Trial
from moebench.reporting.formatting import format_plural
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import Fault, RunResult
from moebench.tasks.task import TASKS

SUFFIX = "-tuning"
"""Suffix of the name of the experiment that holds the tuning runs."""

UNSETTLED = "after tuning"
"""State, in tables, of a run whose arm has not chosen its settings yet."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What is known of a trial."""

    trial: Trial
    values: Mapping[int, float]
    """Tuning seed -> final validation metric, of finished runs with a finite one."""
    problems: tuple[str, ...]
    """Why runs of it have no value, one line for each that ended without one."""
    num_diverged: int

    @property
    def is_finished(self) -> bool:
        """Whether all of its runs have ended."""
        return len(self.values) + len(self.problems) == len(self.trial.cells)

    @property
    def mean(self) -> float | None:
        """Mean over the tuning seeds; None where a run has no value."""
        return fmean(self.values.values()) if len(self.values) == len(self.trial.cells) else None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What an arm chooses from its trials, which may be unfinished."""

    tuning: ArmTuning
    results: tuple[TrialResult, ...]
    lower_is_better: bool

    @property
    def arm(self) -> str:
        """Label of the arm."""
        return self.tuning.arm

    @property
    def is_finished(self) -> bool:
        """Whether all runs of all trials have ended."""
        return all(result.is_finished for result in self.results)

    @cached_property
    def ranking(self) -> tuple[TrialResult, ...]:
        """The trials that have a mean, best first; equal ones in the order of the grid."""
        sign = 1 if self.lower_is_better else -1
        with_mean = [(sign * mean, result) for result in self.results if (mean := result.mean) is not None]
        return tuple(result for _, result in sorted(with_mean, key=lambda pair: pair[0]))

    @property
    def chosen(self) -> TrialResult | None:
        """The best trial; None while one is unfinished, and where all have failed."""
        return self.ranking[0] if self.is_finished and self.ranking else None

    @property
    def ties(self) -> tuple[TrialResult, ...]:
        """The other trials whose mean equals that of the chosen one."""
        return tuple(result for result in self.ranking[1:] if self.chosen and result.mean == self.chosen.mean)

    @property
    def edges(self) -> tuple[str, ...]:
        """The keys whose chosen value is the smallest or largest that was tried: a better one may lie beyond."""
        return self.tuning.list_edges(self.chosen.trial) if self.chosen else ()

    @property
    def failure(self) -> str | None:
        """Why the arm can choose nothing, although all of its runs have ended; None where it can."""
        if not self.is_finished or self.ranking:
            return None
        first = self.results[0]
        return f"all {len(self.results)} trials of its tuning failed, first {first.trial.label}: {first.problems[0]}"

    @property
    def has_diverged(self) -> bool:
        """Whether every trial has a run that diverged."""
        return self.is_finished and all(result.num_diverged for result in self.results)

    def count_runs(self) -> tuple[int, int]:
        """Return how many tuning runs of the arm have ended, and how many there are."""
        num_ended = sum(len(result.values) + len(result.problems) for result in self.results)
        return num_ended, sum(len(result.trial.cells) for result in self.results)

    def describe_progress(self) -> str:
        """Return how many tuning runs of the arm have ended, in words."""
        num_ended, num_runs = self.count_runs()
        return f"{num_ended} of {format_plural(num_runs, 'tuning run')} have ended"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        chosen = self.chosen
        return {
            "chosen": dict(chosen.trial.settings) if chosen else None,
            "validation": chosen.mean if chosen else None,
            "edges": list(self.edges),
            "ties": [dict(result.trial.settings) for result in self.ties],
            "failure": self.failure,
            "trials": [
                {
                    "settings": dict(result.trial.settings),
                    "mean": result.mean,
                    "seeds": {str(seed): value for seed, value in result.values.items()},
                    "diverged": result.num_diverged,
                    "problems": list(result.problems),
                    "cells": [cell.id for cell in result.trial.cells],
                }
                for result in self.results
            ],
        }


@dataclass(frozen=True, kw_only=True)
class TuningState:
    """The choices of all arms, so far."""

    metric: str
    lower_is_better: bool
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    steps: int | None
    choices: tuple[Choice, ...]

    @property
    def unfinished(self) -> tuple[Choice, ...]:
        """The arms that have not chosen yet."""
        return tuple(choice for choice in self.choices if not choice.is_finished)

    @property
    def failed(self) -> tuple[Choice, ...]:
        """The arms that can choose nothing."""
        return tuple(choice for choice in self.choices if choice.failure)

    def describe_progress(self) -> str:
        """Return how many tuning runs have ended, in words."""
        num_ended, num_runs = map(sum, zip(*(choice.count_runs() for choice in self.choices), strict=True))
        return f"{num_ended} of {format_plural(num_runs, 'tuning run')} have ended"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "metric": self.metric,
            "split": "validation",
            "seeds": list(self.seeds),
            "keys": list(self.keys),
            "steps": self.steps,
            "arms": {choice.arm: choice.to_dict() for choice in self.choices},
        }


def read_tuning(experiment: Experiment, results: Path) -> TuningState | None:
    """Return what the arms choose by the results so far; None for an experiment without tuning."""
    tuning = experiment.tuning
    if tuning is None:
        return None
    facts = TASKS.get(tuning.arms[0].trials[0].cells[0].config.task.name).facts
    choices = (
        Choice(
            tuning=arm,
            results=tuple(_read_trial(trial, results, facts.metric) for trial in arm.trials),
            lower_is_better=facts.lower_is_better,
        )
        for arm in tuning.arms
    )
    return TuningState(
        metric=facts.metric,
        lower_is_better=facts.lower_is_better,
        seeds=tuning.seeds,
        keys=tuning.keys,
        steps=tuning.steps,
        choices=tuple(choices),
    )


def _read_trial(trial: Trial, results: Path, metric: str) -> TrialResult:
    values: dict[int, float] = {}
    problems, num_diverged = [], 0
    for cell in trial.cells:
        result = _read_result(results, cell)
        if result is None or result.status == "stopped":
            continue
        value = result.validation.get(metric)
        if result.status == "done" and value is not None and isfinite(value):
            values[cell.seed] = value
            continue
        is_done = result.status == "done"
        reason = f"its validation {metric} is {value}" if is_done else result.error or result.status
        problems.append(f"seed {cell.seed}: {reason}")
        num_diverged += (is_done and value is not None) or result.fault == Fault.DIVERGED
    return TrialResult(trial=trial, values=values, problems=tuple(problems), num_diverged=num_diverged)


def _read_result(results: Path, cell: Cell) -> RunResult | None:
    """Return the result of a tuning run; None where it is damaged, which `run` and `verify` report."""
    try:
        return RunFolder.of(results, cell.id).read_result()
    except UsageError:
        return None


def has_diverged(results: Path, cell_id: str) -> bool:
    """Return whether the last run of a cell diverged."""
    result = RunFolder.of(results, cell_id).read_result()
    return result is not None and result.status == "failed" and result.fault == Fault.DIVERGED


def select_tuned_cells(experiment: Experiment, results: Path) -> Experiment:
    """Return the experiment with the cells of the arms that have chosen; one without tuning as it is.

    Arms that have not chosen, or cannot, have no cells.
    """
    state = read_tuning(experiment, results)
    return experiment if state is None else apply_choices(experiment, state)


def apply_choices(experiment: Experiment, state: TuningState) -> Experiment:
    """Return the experiment with the cells of the arms that have chosen, seeds outermost."""
    chosen = [choice.chosen.trial.final_cells for choice in state.choices if choice.chosen]
    return replace(experiment, cells=tuple(cell for of_seed in zip(*chosen, strict=True) for cell in of_seed))


def list_tuning_cells(experiment: Experiment) -> tuple[Cell, ...]:
    """Return the tuning runs of all arms, seeds outermost; none for an experiment without tuning."""
    trials = [trial for arm in experiment.tuning.arms for trial in arm.trials] if experiment.tuning else []
    return tuple(cell for of_seed in zip(*(trial.cells for trial in trials), strict=True) for cell in of_seed)


def build_tuning_experiment(experiment: Experiment) -> Experiment:
    """Return the tuning runs as an experiment of their own: with a record, a tracker and a name of its own."""
    cells = list_tuning_cells(experiment)
    return Experiment(
        name=f"{experiment.name}{SUFFIX}",
        file=experiment.file,
        question=f"Which settings does each arm of {experiment.name} choose on the validation split?",
        baseline=cells[0].arm,
        cells=cells,
        notes=(),
        stages=experiment.stages,
        tuning_of=experiment.name,
    )
