"""All runs of the synthetic experiment, a thread for each core; the result does not depend on their number."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moebench.calibration.chen2022.data import Setting
from moebench.calibration.chen2022.training import ModelKind, TrainingOutcome, train_and_test

Outcomes = dict[tuple[str, str], list[TrainingOutcome]]
"""(setting, model) -> its outcomes, by seed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    setting: Setting
    kind: ModelKind
    seed: int


def list_runs(settings: Sequence[Setting], kinds: Sequence[ModelKind], num_seeds: int) -> list[Run]:
    """Return the runs, seeds outermost."""
    return [
        Run(setting=setting, kind=kind, seed=seed)
        for seed in range(num_seeds)
        for setting in settings
        for kind in kinds
    ]


def measure_runs(runs: Sequence[Run], jobs: int, on_outcome: Callable[[Run, TrainingOutcome], None]) -> None:
    """Train all runs, `jobs` at a time; call `on_outcome` after each, in the order of `runs`.

    An exception, such as an interruption, ends the other runs at their next step.
    """
    stopped = threading.Event()

    def measure(run: Run) -> TrainingOutcome:
        return train_and_test(run.setting, run.kind, run.seed, stopped=stopped)

    # Sums are divided among threads, so their last bits depend on the number of threads, and long trainings on them.
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        try:
            for run, outcome in zip(runs, executor.map(measure, runs), strict=True):
                on_outcome(run, outcome)
        except BaseException:
            stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
