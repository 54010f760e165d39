"""How many seeds an experiment was planned with, as its record in the results folder keeps it.

The plan is made by the first run. Later runs with other seeds do not change it: they append to its history, and a
comparison treats their seeds as added after looking. Until three seeds have a result no test was possible, so a plan
can still be replaced. A plan belongs to the settings of the baseline arm, so that a trial with fewer steps has its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

from moebench.config import cell_id
from moebench.errors import UsageError
from moebench.runs.cell import Cell
from moebench.runs.checked_json import require_types

RECORD_KEY = "seed_plans"
"""Key of the plans in the record of an experiment."""
CURRENT_KEY = "seed_plan"
"""Key, in the record, of the key of the plan that its cells belong to."""
LOST_KEY = "seed_plans_lost"
"""Key of a record that was written again where a damaged one had been: what was planned is not known any more."""
MIN_TESTED_SEEDS = 3
"""With fewer seeds no arm is tested, so that they are no plan and nothing to look at."""
MAX_ENTRIES = 1000
"""Plans, runs of a plan, arms and seeds of a run that are read from a record."""

Seeds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SeedDesign:
    """What a run intends: the seeds of the experiment file, and how many undecided arms may get."""

    key: str
    """Identifies the settings of the baseline arm; the same for all of its seeds."""
    seeds: Seeds
    maximum: int | None = None
    """Seeds that undecided arms may have in the end; None: those of the file."""
    reserved: Seeds = ()
    """Seeds of tuning, which are never reported."""

    @property
    def final_seeds(self) -> Seeds:
        """The seeds of an arm that is undecided until the end: the next free numbers follow those of the file."""
        num_added = max((self.maximum or 0) - len(self.seeds), 0)
        free = (seed for seed in count(max(self.seeds) + 1) if seed not in self.reserved)
        return (*self.seeds, *islice(free, num_added))


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """The seeds of one run, in the history of a plan."""

    time: float
    seeds: Seeds
    final_seeds: Seeds
    """Equal to `seeds` where none were to be added."""
    num_finished: int
    """Seeds of earlier runs that had a result of the baseline when this run began."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        lists = {"seeds": list(self.seeds), "final_seeds": list(self.final_seeds)}
        return {"time": self.time, **lists, "num_finished": self.num_finished}


@dataclass(frozen=True, kw_only=True)
class SeedPlan:
    """The history of an experiment's seeds, oldest run first, and the seeds that undecided arms were given."""

    entries: tuple[PlanEntry, ...] = ()
    added: Mapping[str, Seeds] = field(default_factory=dict)
    """Arm -> seeds beyond those of the file."""
    is_lost: bool = False
    """Whether the record was damaged: nobody knows what was planned, so no look counts as planned."""

    @property
    def _tested(self) -> list[PlanEntry]:
        """The entries that count, the plan first: those with enough seeds, from the last that replaced the others."""
        tested = [entry for entry in self.entries if len(entry.final_seeds) >= MIN_TESTED_SEEDS]
        replacing = [index for index, entry in enumerate(tested) if entry.num_finished < MIN_TESTED_SEEDS]
        return tested[replacing[-1] if replacing else 0 :]

    @property
    def planned(self) -> Seeds:
        """The seeds of the first look; empty where no plan is known."""
        return self._tested[0].seeds if self._tested else ()

    @property
    def final(self) -> Seeds:
        """The seeds of the second look, which equal those of the first where only one was planned."""
        return self._tested[0].final_seeds if self._tested else ()

    @property
    def extensions(self) -> tuple[Seeds, ...]:
        """The larger sets of seeds that later runs announced, in their order."""
        announced = [frozenset(self.planned), frozenset(self.final)]
        extensions = []
        for entry in self._tested[1:]:
            seeds = frozenset(entry.final_seeds)
            if seeds > announced[1] and seeds not in announced:
                announced.append(seeds)
                extensions.append(entry.final_seeds)
        return tuple(extensions)

    def foresees(self, entry: PlanEntry) -> bool:
        """Return whether a run changes nothing: its seeds are those of a look that is known."""
        known = [set(self.planned), set(self.final), *map(set, self.extensions)]
        same_plan = {(earlier.seeds, earlier.final_seeds) for earlier in self.entries}
        is_known = set(entry.seeds) in known and set(entry.final_seeds) in known
        return (entry.seeds, entry.final_seeds) in same_plan or is_known

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: the planned number first, for readers of the file."""
        return {
            "planned": len(self.planned),
            "maximum": len(self.final),
            "history": [entry.to_dict() for entry in self.entries],
            "added": {arm: list(seeds) for arm, seeds in self.added.items()},
        }


def identify_settings(cell: Cell) -> str:
    """Return the id that all seeds of an arm have in common."""
    return change_seed(cell, 0).id


def change_seed(cell: Cell, seed: int) -> Cell:
    """Return the cell of the same arm with another seed, and so with parents of that seed."""
    config = replace(cell.config, seed=seed)
    parents = tuple(change_seed(parent, seed) for parent in cell.parents)
    if parents:
        ids = {old.id: new.id for old, new in zip(cell.parents, parents, strict=True)}
        names = [replace(parent, name=ids.get(parent.name, parent.name)) for parent in config.init.parents]
        config = replace(config, init=config.init.replace_parents(names))
    return replace(
        cell,
        id=cell_id(config, cell.data_digest, cell.plugin_digests),
        seed=seed,
        config=config,
        varies={**cell.varies, "seed": seed},
        parents=parents,
    )


def list_added_cells(cells: Sequence[Cell], added: Mapping[str, Seeds]) -> list[Cell]:
    """Return the cells of the added seeds, seeds outermost; arms that are not among `cells` have none."""
    first = {cell.arm: cell for cell in reversed(cells)}
    present = {(cell.arm, cell.seed) for cell in cells}
    seeds = sorted({seed for arm_seeds in added.values() for seed in arm_seeds})
    return [
        change_seed(cell, seed)
        for seed in seeds
        for arm, cell in first.items()
        if seed in added.get(arm, ()) and (arm, seed) not in present
    ]


def append_run(plan: SeedPlan, design: SeedDesign, *, num_finished: int, time: float) -> SeedPlan:
    """Return the plan with a run of this design in its history; the same plan where it was foreseen."""
    entry = PlanEntry(time=time, seeds=design.seeds, final_seeds=design.final_seeds, num_finished=num_finished)
    return plan if plan.foresees(entry) else replace(plan, entries=(*plan.entries, entry))


def read_seed_plan(record: Mapping[str, Any], key: str) -> SeedPlan:
    """Return the plan of these settings from the record of an experiment, an empty one where it has none.

    Raises UsageError for a damaged one: without it every look would seem to be planned.
    """
    try:
        plans = record.get(RECORD_KEY, {})
        _require_size(plans, dict)
        values = plans.get(key, {"history": [], "added": {}})
        require_types(values if isinstance(values, dict) else {}, {"history": list, "added": dict})
        _require_size(values["history"], list)
        _require_size(values["added"], dict)
        return SeedPlan(
            entries=tuple(_read_entry(entry) for entry in values["history"]),
            added={arm: _read_seeds(seeds) for arm, seeds in values["added"].items()},
            is_lost=bool(record.get(LOST_KEY, False)),
        )
    except (ValueError, OverflowError) as error:
        name = str(record.get("name", ""))[:40]
        raise UsageError(
            f"record of experiment '{name}': '{RECORD_KEY}' is damaged ({error}); remove this key from it and name the"
            " planned number of seeds wherever you report the result"
        ) from error


def _read_entry(values: Any) -> PlanEntry:
    types: dict[str, Any] = {"time": (int, float), "seeds": list, "final_seeds": list, "num_finished": int}
    require_types(values if isinstance(values, dict) else {}, types)
    return PlanEntry(
        time=float(values["time"]),
        seeds=_read_seeds(values["seeds"]),
        final_seeds=_read_seeds(values["final_seeds"]),
        num_finished=values["num_finished"],
    )


def _read_seeds(values: Any) -> Seeds:
    _require_size(values, list)
    for seed in values:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"{str(seed)[:40]!r} is not a seed")
    if not values:
        raise ValueError("a run without seeds")
    return tuple(dict.fromkeys(values))


def _require_size(values: Any, kind: type[list[Any]] | type[dict[str, Any]]) -> None:
    if not isinstance(values, kind) or len(values) > MAX_ENTRIES:
        raise ValueError(f"{str(values)[:40]!r}, expected {kind.__name__} of at most {MAX_ENTRIES}")


def find_seed_plan(record: Mapping[str, Any] | None, design: SeedDesign | None) -> SeedPlan:
    """Return the recorded plan of a design; where none is recorded, the seeds of the file are the plan.

    Raises UsageError for a damaged one.
    """
    if design is None:
        return SeedPlan()
    plan = read_seed_plan(record or {}, design.key)
    return plan if plan.planned else append_run(plan, design, num_finished=0, time=0.0)
