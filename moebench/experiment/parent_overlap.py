"""Parents that were trained on the test text of their children: a gain on it would be memory, not adaptation."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experiment.cells import list_ancestors
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import Parent
from moebench.pretrained.folder import PREFIX, open_pretrained
from moebench.pretrained.parent import read_parent
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig
from moebench.tasks.cache import load_or_create
from moebench.tasks.contract import read_source_digest
from moebench.tasks.language import TextTask
from moebench.tasks.text.shared_documents import SharedDocuments, find_shared_documents


def require_no_overlap(cells: Sequence[Cell], costs: ModelCosts) -> list[str]:
    """Raise UsageError for a parent whose training text has test documents of a child's domains, unless it is allowed.

    The parents of parents count as well. Returns notes: overlap that `init.allow_overlap` allows, and parents whose
    text is unknown. Tasks that are not on text are not looked at.
    """
    notes: list[str] = []
    seen: set[str] = set()
    for cell in cells:
        key = f"{cell.config.init.from_} {cell.config.task!r}"
        if cell.config.init.has_parent and key not in seen:
            seen.add(key)
            notes += _check_cell(cell, costs)
    return list(dict.fromkeys(notes))


def describe_training_text(parent: Parent) -> str:
    """Return what a folder says of the text that its model was trained on, which nothing proves."""
    cell = read_parent(open_pretrained(f"{PREFIX}{parent.name}", requires_experts=False)).cell or {}
    task = cell.get("task")
    if not isinstance(task, Mapping) or not isinstance(task.get("data"), Mapping):
        return f"what {parent} was trained on is unknown"
    keys = ("path", "dataset", "held_out_domains")
    data = ", ".join(f"task.data.{key}={str(task['data'][key])[:100]!r}" for key in keys if task["data"].get(key))
    return f"{parent} was trained on {data or 'the embedded text'}, as its config.json says, and is not compared"


def _check_cell(cell: Cell, costs: ModelCosts) -> Iterator[str]:
    child = costs.task(cell.config)
    for parent in _iterate_ancestors(cell, costs):
        label = f"{parent.source}{parent.origin}"
        if parent.source.kind == "hf":
            known = describe_training_text(parent.source)
            yield f"init.from: {known}{parent.origin}; its text may have the test text of this task"
            continue
        if parent.config is None or not parent.has_same_data:
            yield f"init.from: what {label} was trained on is unknown; its text may have the test text of this task"
            continue
        task = costs.task(parent.config)
        if not isinstance(child, TextTask) or not isinstance(task, TextTask):
            continue
        shared = count_shared(task, child, parent.config, cell.config, costs)
        if not shared.num_shared:
            continue
        domains = ", ".join(f"{domain} {count}" for domain, count in sorted(shared.shared.items()))
        message = (
            f"init.from: the training text of {label} has {shared.num_shared} of the {shared.documents} test documents"
            f" of {cell.arm}, verbatim or nearly ({domains})"
        )
        if not cell.config.init.allow_overlap:
            raise UsageError(f"{message}: a gain on them may be memorised. Give other data, or init.allow_overlap=true")
        yield f"{message}; init.allow_overlap allows it"


@dataclass(frozen=True, kw_only=True)
class _Ancestor:
    """A run or a folder whose weights are in those that a cell starts from."""

    source: Parent
    origin: str
    """For messages: which of the others started from it; empty for a parent of the cell itself."""
    config: CellConfig | None
    """None where it is unknown."""
    has_same_data: bool
    """Whether its data can be read, and are those that it was trained on."""


def _iterate_ancestors(cell: Cell, costs: ModelCosts) -> Iterator[_Ancestor]:
    """Yield the parents of a cell, theirs, and so on, each once."""
    stages = {each.id: each.config for each in list_ancestors([cell])}
    remaining = [(parent, "") for parent in cell.config.init.parents]
    seen: set[str] = set()
    while remaining:
        parent, origin = remaining.pop(0)
        if str(parent) in seen:
            continue
        seen.add(str(parent))
        config, has_same_data = (stages[parent.name], True) if parent.name in stages else _read_run(parent, costs)
        yield _Ancestor(source=parent, origin=origin, config=config, has_same_data=has_same_data)
        if config is not None:
            remaining += [(each, f" (from which {parent} started)") for each in config.init.parents]


def _read_run(parent: Parent, costs: ModelCosts) -> tuple[CellConfig | None, bool]:
    """Return the configuration of a run, None where it cannot be read, and whether its data are still the same."""
    config = None
    try:
        if parent.kind == "run":
            stored: dict[str, Any] = RunFolder.of(costs.results, parent.name).read_cell()
            config = resolve(stored["config"])
            digest = read_source_digest(config.task)
            return config, bool(digest == stored["data"]["digest"])
    except UsageError:  # a parent that cannot be read is reported by other checks
        pass
    return config, False


def count_shared(
    parent: TextTask, child: TextTask, parent_config: Any, child_config: Any, costs: ModelCosts
) -> SharedDocuments:
    """Return how many test documents of a child's domains are in the training text of its parent."""
    none = SharedDocuments(shared={}, documents=0)
    if parent.text.digest == child.text.digest:
        return none  # the data of one run, which its preparation has checked
    overlap = parent.text.overlap
    is_clean = overlap is not None and not any(removed for removed, _ in overlap.values())
    if is_clean and _identify_source(parent_config) == _identify_source(child_config):
        return none  # one division into splits, and the preparation of the parent has looked at the test split of all
    key = hashlib.sha256(f"{parent.text.digest} {child.text.digest}".encode()).hexdigest()[:24]

    def create() -> tuple[dict[str, Any], dict[str, Any]]:
        documents = find_shared_documents(parent.text, child.text)
        return {"shared": dict(documents.shared), "documents": documents.documents}, {}

    values = load_or_create(costs.results / "cache" / f"shared-{key}", create)[0]
    return SharedDocuments(shared=values["shared"], documents=values["documents"])


def _identify_source(config: CellConfig) -> str:
    """Return the digest of a source of text with all of its domains: equal where the division into splits is."""
    task = replace(config.task, data=replace(config.task.data, held_out_domains=[]))  # type: ignore[attr-defined,call-arg]
    return read_source_digest(task)
