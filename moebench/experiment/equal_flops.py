"""Arms of equal FLOPs of training, and the arm that continues a dense parent where others upcycle it."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moebench.errors import UsageError
from moebench.experiment.arms import Arm
from moebench.experiment.cells import CellBuilder
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import InitConfig, Parent
from moebench.routing.router import ROUTERS
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig

CONTINUED = "dense continued"
"""Label of the arm that is added."""
TOLERANCE = 0.01
"""Largest difference in FLOPs of training between arms that are called equal."""
AXES = ("arm", "router")
"""Grid keys on which the added arm has its label; else the first one."""


@dataclass(frozen=True, kw_only=True)
class TrainingBudget:
    """Sets the steps of arms by their FLOPs of training, forward and backward, as planned."""

    costs: ModelCosts

    def flops(self, config: CellConfig) -> float:
        """Return the FLOPs of all training steps of a cell."""
        return self.costs.training_flops(config)

    def with_flops_of(self, config: CellConfig, reference: CellConfig) -> CellConfig:
        """Return the cell with the number of steps whose FLOPs are nearest to the reference's; its warm-up stays."""
        steps = max(1, round(self.flops(reference) * config.train.steps / self.flops(config)))
        return replace(config, train=replace(config.train, steps=steps))

    def compute_share(self, config: CellConfig, reference: CellConfig) -> float:
        """Return the FLOPs of training of a cell over those of another one."""
        return self.flops(config) / self.flops(reference)


@contextlib.contextmanager
def open_costs(results: Path | None) -> Iterator[ModelCosts]:
    """Yield the costs of models; without a results folder, what is prepared for them is not kept."""
    if results is not None:
        yield ModelCosts(results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield ModelCosts(Path(folder))


def match_training(
    arms: Sequence[Arm], baseline: str, builder: CellBuilder, costs: ModelCosts, equal: str
) -> tuple[list[Arm], tuple[str, ...]]:
    """Return the arms as they are compared, and notes: with the continued parent, and with equal FLOPs if asked for."""
    arms, added_notes = add_continued_parent(arms, baseline, builder, costs)
    arms, equal_notes = equalise_flops(arms, baseline, costs) if equal == "training_flops" else (arms, ())
    notes = (*_note_unequal(arms, builder, costs), *_note_other_starts(arms, builder, costs))
    return arms, (*added_notes, *equal_notes, *notes)


def equalise_flops(arms: Sequence[Arm], baseline: str, costs: ModelCosts) -> tuple[list[Arm], tuple[str, ...]]:
    """Return the arms with the steps that give each the baseline's FLOPs of training, and a note on them.

    Raises UsageError where no number of steps is within 1 %.
    """
    budget = TrainingBudget(costs=costs)
    reference = next(arm.config for arm in arms if arm.label == baseline)
    equal = [_with_config(arm, budget.with_flops_of(arm.config, reference)) for arm in arms]
    for arm in equal:
        share = budget.compute_share(arm.config, reference)
        if abs(share - 1) > TOLERANCE:
            raise UsageError(
                f"equal: {arm.config.train.steps} steps of '{arm.label}' have {share:.3f} times the FLOPs of the"
                f" baseline's {reference.train.steps} (allowed: ±{TOLERANCE:.0%}; raise train.steps)"
            )
    steps = ", ".join(f"{arm.label} {arm.config.train.steps}" for arm in equal)
    return equal, (f"equal: training_flops gives all arms the FLOPs of '{baseline}': train.steps is {steps}",)


def add_continued_parent(
    arms: Sequence[Arm], baseline: str, builder: CellBuilder, costs: ModelCosts
) -> tuple[list[Arm], tuple[str, ...]]:
    """Return the arms with one more that continues the dense parent of an upcycled arm for its FLOPs of training.

    None is added where no arm makes experts of a dense parent, or a dense arm starts from the same parent.
    """
    upcycled = [arm for arm in arms if _upcycles(arm, builder, costs.results)]
    if not upcycled:
        return list(arms), ()
    template = next((arm for arm in upcycled if arm.label == baseline), upcycled[0])
    if any(_continues(arm, template, builder) for arm in arms):
        return list(arms), ()
    budget = TrainingBudget(costs=costs)
    continued = _continue_parent(template, builder, arms)
    continued = _with_config(continued, budget.with_flops_of(continued.config, template.config))
    note = (
        f"'{continued.label}' is added: the dense parent of '{template.label}', trained on for the same FLOPs,"
        f" {continued.config.train.steps} steps"
    )
    return [*arms, continued], (note,)


def _note_unequal(arms: Sequence[Arm], builder: CellBuilder, costs: ModelCosts) -> Iterator[str]:
    """Yield a note for each upcycled arm that no continued dense parent has the FLOPs of."""
    budget = TrainingBudget(costs=costs)
    for arm in arms:
        if not _upcycles(arm, builder, costs.results):
            continue
        continued = [each for each in arms if _continues(each, arm, builder)]
        shares = [budget.compute_share(arm.config, each.config) for each in continued]
        if all(abs(share - 1) > TOLERANCE for share in shares):
            pairs = zip(shares, continued, strict=True)
            ratios = [f"{share:.3f} times the FLOPs of '{each.label}'" for share, each in pairs]
            yield f"{arm.label}: its training has {', '.join(ratios)}; `equal: training_flops` gives all arms the same"


def _note_other_starts(arms: Sequence[Arm], builder: CellBuilder, costs: ModelCosts) -> Iterator[str]:
    """Yield a note on upcycled arms that do not start at the function of their parent, even without noise."""
    upcycled = [arm for arm in arms if _upcycles(arm, builder, costs.results)]
    if not upcycled:
        return
    from moebench.training.initial_weights.equality import starts_as_dense_parent  # with PyTorch's compiler

    others = [arm.label for arm in upcycled if not starts_as_dense_parent(arm.config, costs.task(arm.config))]
    if others:
        yield (
            f"{', '.join(others)}: copies of the parent's networks do not give its output before the first step: the"
            " weights of a token do not sum to 1"
        )


def _with_config(arm: Arm, config: CellConfig) -> Arm:
    """Return the arm with other steps, which it has for its own FLOPs."""
    if config == arm.config:
        return arm
    return replace(arm, config=config, varies={**arm.varies, "train.steps": config.train.steps})


def _continues(arm: Arm, upcycled: Arm, builder: CellBuilder) -> bool:
    """Return whether an arm continues the dense parent of an upcycled arm."""
    if not _is_dense(arm.config) or not arm.config.init.has_parent:
        return False
    return _list_origins(arm, builder) == _list_origins(upcycled, builder)


def _list_origins(arm: Arm, builder: CellBuilder) -> list[str]:
    """Return names of what an arm starts from: of arms of stages, or as the arm names it."""
    return [
        origin
        for parent in arm.config.init.parents
        for origin in (
            [f"{parent.name}/{each.label}" for each in builder.list_sources(arm, parent)]
            if parent.kind == "stage"
            else [str(parent)]
        )
    ]


def _is_dense(config: CellConfig) -> bool:
    return ROUTERS.get(config.router.name).item.form.is_dense


def _upcycles(arm: Arm, builder: CellBuilder, results: Path) -> bool:
    """Return whether an arm makes its experts of the networks of a single dense parent."""
    parents = arm.config.init.parents
    if len(parents) != 1 or _is_dense(arm.config):
        return False
    return _is_dense_parent(parents[0], arm, builder, results)


def _is_dense_parent(parent: Parent, arm: Arm, builder: CellBuilder, results: Path) -> bool:
    if parent.kind == "stage":
        sources = builder.list_sources(arm, parent)
        return len(sources) == 1 and _is_dense(sources[0].config)
    if parent.kind == "run":
        try:
            name = RunFolder.of(results, parent.name).read_cell()["config"].get("router", {}).get("name")
        except UsageError:
            return False  # before training, the parent is required
        return name in ROUTERS.names() and ROUTERS.get(name).item.form.is_dense
    from moebench.training.initial_weights.folder import open_folder

    return "layout" not in open_folder(parent).settings


def _continue_parent(template: Arm, builder: CellBuilder, arms: Sequence[Arm]) -> Arm:
    """Return the arm that continues the parent of an upcycled arm, with the same training."""
    (parent,) = template.config.init.parents
    if parent.kind == "stage":
        parent = replace(parent, label=builder.list_sources(template, parent)[0].label)
    config = replace(
        template.config,
        router=ROUTERS.get("dense").item.Config(name="dense"),
        init=InitConfig(from_=str(parent), digest=template.config.init.digest),
        train=replace(template.config.train, trainable="all"),
    )
    axis = next((key for key in (*AXES, *template.axes) if key in template.axes), None)
    axes = {**template.axes, axis: CONTINUED} if axis else {}
    label = ", ".join(axes.values()) or CONTINUED
    if any(arm.label == label for arm in arms):
        raise UsageError(f"grid: the arm '{label}' does not continue the parent of '{template.label}'; rename it")
    return Arm(
        label=label,
        config=config,
        varies={**template.varies, "router.name": "dense"},
        data_digest=template.data_digest,
        axes=axes,
    )
