"""The cells of arms: one for every seed, with the runs of earlier stages that it starts from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from moebench.config import cell_id
from moebench.errors import UsageError, build_unknown_error, suggest
from moebench.experiment.arms import Arm
from moebench.init_config import Parent
from moebench.registry import Plugin, select_plugins
from moebench.runs.cell import Cell


@dataclass(frozen=True, kw_only=True)
class StageArms:
    """An earlier stage: its name, and its arms in the order of the grid."""

    name: str
    arms: Sequence[Arm]


@dataclass(frozen=True, kw_only=True)
class CellBuilder:
    """Builds the cells of one stage."""

    plugins: Sequence[Plugin]
    stage: str = ""
    """Name of the stage; empty for an experiment without stages."""
    earlier: Sequence[StageArms] = ()
    """The stages before it, in their order."""
    built: dict[tuple[str, str, int], Cell] = field(default_factory=dict)
    """Cells of earlier stages by stage, arm and seed: those that start from the same one share it."""

    def build(self, arm: Arm, seed: int) -> Cell:
        """Return the cell of an arm and a seed; raise UsageError where it starts from a run that no stage has."""
        config, parents = replace(arm.config, seed=seed), list[Cell]()
        sources = list[Parent]()
        for source in config.init.parents:
            if source.kind == "stage":
                cells = [self._build_parent(*parent, seed) for parent in self._find_parents(arm, source)]
                parents += cells
                sources += [Parent(kind="run", name=cell.id) for cell in cells]
            else:
                sources.append(source)
        if len(sources) > len(config.init.parents):
            _require_combination(arm, parents)
        if parents:
            config = replace(config, init=config.init.replace_parents(sources))
        needed = select_plugins(self.plugins, _collect_names(config)) if self.plugins else []
        return Cell(
            id=cell_id(config, arm.data_digest, [plugin.digest for plugin in needed]),
            arm=arm.label,
            seed=seed,
            config=config,
            varies={**arm.varies, "seed": seed},
            plugins=tuple(str(plugin.file) for plugin in needed),
            plugin_digests=tuple(plugin.digest for plugin in needed),
            data_digest=arm.data_digest,
            stage=self.stage,
            parents=tuple(parents),
        )

    def list_sources(self, arm: Arm, source: Parent) -> list[Arm]:
        """Return the arms that `stage:NAME` or `stage:NAME/LABEL` stands for; raise UsageError where there is none."""
        return [parent for _, parent in self._find_parents(arm, source)]

    def _find_parents(self, arm: Arm, source: Parent) -> list[tuple[int, Arm]]:
        """Return the arms that `stage:NAME` or `stage:NAME/LABEL` stands for, each with the number of its stage."""
        names = [stage.name for stage in self.earlier]
        if source.name not in names:
            where = f"stage '{self.stage}'" if self.stage else "an experiment without stages"
            allowed = f"earlier stages, {', '.join(names)}" if names else "null, run:ID or hf:PATH"
            raise UsageError(f"init.from: {source} in {where}: no stage before it has this name (allowed: {allowed})")
        number = names.index(source.name)
        arms = self.earlier[number].arms
        labels = [parent.label for parent in arms]
        if source.label is not None:
            chosen = [parent for parent in arms if parent.label == source.label]
            if not chosen:
                raise build_unknown_error(f"init.from: {source}: arm of stage {source.name}", source.label, labels)
        else:
            chosen = [parent for parent in arms if _has_common_labels(parent, arm)]
        if not chosen:
            raise UsageError(
                f"init.from: {source}: no arm of that stage agrees with '{arm.label}' on the axes that both have; name"
                f" one as {source}/LABEL.{suggest(arm.label, labels)} Its arms: {'; '.join(labels)}"
            )
        return [(number, parent) for parent in chosen]

    def _build_parent(self, number: int, arm: Arm, seed: int) -> Cell:
        stage = self.earlier[number].name
        key = (stage, arm.label, seed)
        if key not in self.built:
            self.built[key] = replace(self, stage=stage, earlier=self.earlier[:number]).build(arm, seed)
        return self.built[key]


def _has_common_labels(parent: Arm, child: Arm) -> bool:
    return all(child.axes[key] == label for key, label in parent.axes.items() if key in child.axes)


def _require_combination(arm: Arm, parents: Sequence[Cell]) -> None:
    """Raise UsageError where several runs of a stage match an arm that does not say how they are combined."""
    if getattr(arm.config.init, "combine", None):
        return
    labels = "; ".join(parent.arm for parent in parents)
    raise UsageError(
        f"init.from: '{arm.label}' would start from {len(parents)} runs of stage {parents[0].stage} ({labels}); name"
        f" one as stage:{parents[0].stage}/LABEL, or choose with init.combine how they become one model"
    )


def _collect_names(value: Any) -> Iterator[str]:
    """Yield all strings that may be names of components: string values, and keys of mappings."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for option in fields(value):
            yield from _collect_names(getattr(value, option.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _collect_names(item)
    elif isinstance(value, Mapping):
        yield from value
        yield from _collect_names(list(value.values()))


def list_ancestors(cells: Sequence[Cell]) -> list[Cell]:
    """Return the runs of earlier stages that cells need, each once: those of the first stage come first."""
    ordered: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        for parent in cell.parents:
            if parent.id not in ordered:
                visit(parent)
                ordered[parent.id] = parent

    for cell in cells:
        visit(cell)
    return list(ordered.values())
