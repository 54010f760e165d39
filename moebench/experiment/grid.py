"""Build the cells of an experiment: every arm for every seed, seeds outermost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moebench.config import apply_overrides, load_experiment
from moebench.errors import build_unknown_error, require_text
from moebench.experiment.arms import DEFAULT_RESOLUTION, Arm, Resolution, note_partial_overrides, resolve_arms
from moebench.experiment.cells import CellBuilder, StageArms
from moebench.experiment.equal_flops import match_training, open_costs
from moebench.experiment.seed_plan import SeedDesign, identify_settings
from moebench.experiment.sizes import apply_size, check_size, name_experiment
from moebench.experiment.stages import StagePart, split_stages
from moebench.experiment.stored_digests import choose_digest
from moebench.experiment.trials import Tuning, build_tuning
from moebench.file_access import require_plain_name
from moebench.plugin_errors import convert_plugin_errors
from moebench.registry import Plugin, load_plugin
from moebench.runs.cell import Cell
from moebench.schema import DEFAULT_MARGIN, ExperimentConfig

BASELINE = "dense"
"""The baseline of `compare ROUTER...`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment and its cells, which have been checked."""

    name: str
    file: str
    question: str
    baseline: str
    cells: tuple[Cell, ...]
    """Seeds outermost, so that every prefix of the grid is a fair comparison."""
    notes: tuple[str, ...]
    """Lines for the user to read before training."""
    axes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Arm -> grid key -> label of the arm's value, without keys that mean nothing to the arm."""
    tuning: Tuning | None = None
    """What the arms try before they are trained; `cells` are those of the file until arms have chosen
    (`select_tuned_cells`)."""
    margin: float = DEFAULT_MARGIN
    """Differences below this share of the baseline's mean count as equivalence."""
    stages: tuple[str, ...] = ()
    """Names of the stages: `cells` are the last one, and runs of the others are the `parents` of cells."""
    tuning_of: str = ""
    """The experiment whose tuning runs the cells are; empty: they are something else."""
    stage_of: str = ""
    """The experiment that the cells are an earlier stage of; empty: there is none."""
    design: SeedDesign | None = None
    """Seeds of the file, and how many undecided arms may get; None for tuning runs, which are not compared."""

    @property
    def is_reported(self) -> bool:
        """Whether the cells are compared: they are no tuning runs and no earlier stage of another experiment."""
        return not (self.tuning_of or self.stage_of)

    @property
    def has_several_data(self) -> bool:
        """Whether arms of the last stage are trained on different data, which is what they are compared for."""
        return bool(self.stages) and len({cell.data_digest for cell in self.cells}) > 1

    @property
    def arms(self) -> list[str]:
        """The arms in the order of the grid."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))


def ignore_progress(number: int, total: int) -> None:
    """Show nothing."""


def expand(
    path: Path,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = ignore_progress,
    finished_in: Path | None = None,
    results: Path | None = None,
) -> Experiment:
    """Read an experiment file and build its cells; raise UsageError if one could not be trained.

    `on_progress` is called with the number of arms that are checked and that of all arms. `finished_in`: a results
    folder; where data are missing, cells are those that were trained there. `results`: the folder of the runs that
    `init.from` names by the beginning of their ids; None: `finished_in`.
    """
    loaded = [load_plugin(plugin) for plugin in plugins]  # first: the file may use what they register
    config, cell_overrides = load_experiment(path, overrides)
    own_size = load_experiment(path)[0].size if config.size is not None else None
    config = apply_size(config, own_size, cell_overrides)
    is_regridded = any(override.startswith(("grid", "seeds", "stages")) for override in overrides)
    resolution = Resolution(
        on_progress=on_progress, find_digest=choose_digest(finished_in), results=results or finished_in
    )
    experiment = _build(path, config, cell_overrides, loaded, is_regridded=is_regridded, resolution=resolution)
    return replace(experiment, name=name_experiment(experiment.name, config.size, own_size))


def expand_routers(
    routers: Sequence[str], task: str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> Experiment:
    """Build the experiment that compares routers with the dense model, everything else at its default."""
    loaded = [load_plugin(plugin) for plugin in plugins]
    arms = list(dict.fromkeys([BASELINE, *routers]))
    config = ExperimentConfig(
        question=f"How do {' and '.join(routers)} compare with a dense model on {task}?",
        base={"task": {"name": task}},
        grid={"router": arms},
        baseline=BASELINE,
    )
    return expand_config("-".join(["compare", *routers]), config, overrides, loaded)


def expand_config(
    name: str, config: ExperimentConfig, overrides: Sequence[str] = (), plugins: Sequence[Plugin] = ()
) -> Experiment:
    """Build the cells of an experiment that has no file."""
    config, cell_overrides = apply_overrides(config, overrides)
    config = apply_size(config, None, cell_overrides)
    experiment = _build(Path(name), config, cell_overrides, plugins, is_regridded=False)
    return replace(experiment, name=name_experiment(experiment.name, config.size, None))


def _build(
    path: Path,
    config: ExperimentConfig,
    cell_overrides: Mapping[str, Any],
    plugins: Sequence[Plugin],
    *,
    is_regridded: bool,
    resolution: Resolution = DEFAULT_RESOLUTION,
) -> Experiment:
    require_text(config.question, "question")
    require_text(config.baseline, "baseline")
    parts, notes = split_stages(config, cell_overrides)
    earlier: list[StageArms] = []
    for part in parts[:-1]:
        arms, arm_notes = _resolve_part(part, path, resolution)
        earlier.append(StageArms(name=part.name, arms=arms))
        notes = (*notes, *(f"stage {part.name}: {note}" for note in arm_notes))
    last = parts[-1]
    arms, arm_notes = _resolve_part(last, path, resolution)
    baseline, baseline_notes = _choose_baseline(config.baseline, [arm.label for arm in arms], is_regridded=is_regridded)
    builder = CellBuilder(plugins=plugins, stage=last.name, earlier=earlier)
    with open_costs(resolution.results) as costs:
        arms, flops_notes = match_training(arms, baseline, builder, costs, config.equal)
    cells = [builder.build(arm, seed) for seed in config.seeds for arm in arms]
    tuning = None
    if config.tune.grid:
        with convert_plugin_errors():
            tuning = build_tuning(last.config, arms, builder.build)
    first = next(cell for cell in cells if cell.arm == baseline)
    return Experiment(
        name=require_plain_name(path.stem, f"{path}: name of the experiment, the file's without its ending"),
        file=str(path),
        question=config.question,
        baseline=baseline,
        cells=tuple(cells),
        axes={arm.label: arm.axes for arm in arms},
        tuning=tuning,
        stages=tuple(part.name for part in parts) if config.stages else (),
        design=SeedDesign(
            key=identify_settings(first),
            seeds=tuple(config.seeds),
            reserved=tuple(config.tune.seeds) if config.tune.grid else (),
        ),
        margin=config.margin,
        notes=(*arm_notes, *notes, *baseline_notes, *flops_notes),
    )


def _resolve_part(part: StagePart, path: Path, resolution: Resolution) -> tuple[list[Arm], tuple[str, ...]]:
    """Return the arms of a stage, and notes on them."""
    where = f"{path}, stage {part.name}" if part.name else str(path)
    with convert_plugin_errors():
        arms, notes = resolve_arms(part.config, part.overrides, where, resolution)
    check_size(part.config.size, [arm.config.task.name for arm in arms])
    partial_notes = note_partial_overrides(part.overrides, arms, part.config.grid)
    return arms, (*notes, *partial_notes, *_note_long_warmup(arms))


def _note_long_warmup(arms: Sequence[Arm]) -> Iterator[str]:
    """Yield a note for each pair of steps and warm-up with which the learning rate never reaches its peak."""
    for steps, warmup in dict.fromkeys((arm.config.train.steps, arm.config.train.warmup_steps) for arm in arms):
        if warmup > steps:
            share = f"{steps / warmup:.0%} of train.learning_rate" if warmup < 2**63 else "its peak"
            yield f"train.warmup_steps={warmup} is more than train.steps={steps}: the rate never exceeds {share}"


def _choose_baseline(requested: str | None, arms: Sequence[str], *, is_regridded: bool) -> tuple[str, tuple[str, ...]]:
    if requested is None or requested in arms:
        return requested or arms[0], ()
    if is_regridded:
        return arms[0], (f"baseline '{requested}' is not in this grid; '{arms[0]}' replaces it",)
    raise build_unknown_error("baseline", requested, arms)
