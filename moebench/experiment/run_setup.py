"""How a grid is run: options of `moebench run`, and the parts that launch, show and draw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from moebench.experiment.grid import Experiment
from moebench.launch.launcher import Launcher
from moebench.runs.folder import RunFolder


class Figures(Protocol):
    """Draws the figures that are stored with the results."""

    def draw_run_figures(self, folder: RunFolder, title: str) -> None:
        """Draw the expert loads of one finished run into its folder."""

    def draw_experiment_figures(self, experiment: Experiment, results: Path) -> None:
        """Draw the curves of all arms into the results folder."""


@dataclass(frozen=True)
class RunOptions:
    """How a grid is run; no option changes a result."""

    jobs: int = 0
    """Cells at a time, 0: as many as fit this machine."""
    tracker: str | None = None
    """MLflow URI; "none": no tracker; None: the database in the results folder."""
    reshard: bool = False
    """Whether new cells start from the checkpoints of the same cells on another mesh."""
    retries: int = 0
    """How often a failed cell is tried again, from its last checkpoint."""
    fail_fast: bool = False
    """Whether the first failed cell stops the others, with everything saved."""
    ignore_memory: bool = False
    """Whether to train cells whose estimated memory exceeds that of the machine."""


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """Where and how grids are run, and what shows them."""

    results: Path
    options: RunOptions
    launcher: Launcher
    console: Console
    figures: Figures
