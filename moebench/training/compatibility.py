"""Check that the task, the layout, the router and the processes of a cell fit each other."""

import torch

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity
from moebench.models.plan import plan_blocks
from moebench.parallel.expert_sharding import check_spread
from moebench.routing.router import ROUTERS
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS


def check_cell(config: CellConfig) -> None:
    """Raise UsageError for what can be known before any data is read: options that do not fit, a refused router."""
    plan_blocks(config)
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: 'cuda' was asked for, but torch finds no CUDA device (allowed: auto, cpu)")
    _check_overflow(config)
    _check_spread(config)
    _check_together(config)
    _check_halves(config)
    _check_labels(config)
    leak = _leak(config)
    if _experts_must_be_causal(config) and not config.allow_noncausal and leak:
        raise UsageError(
            f"{leak}; task '{config.task.name}' predicts from the past. Allowed: a causal choice,"
            f"{_in_encoder(config)} or allow_noncausal=true, which marks the arm in every table"
        )


def list_marks(config: CellConfig) -> tuple[str, ...]:
    """Return the warnings that every table must show beside this cell's numbers."""
    return ("non-causal",) if _experts_must_be_causal(config) and _leak(config) else ()


def _in_encoder(config: CellConfig) -> str:
    two = TASKS.get(config.task.name).facts.is_encoder_decoder
    return " layout.experts_in=encoder," if two else ""


def _check_overflow(config: CellConfig) -> None:
    """Refuse to send assignments on to the next best expert where nothing says which that is."""
    router = ROUTERS.get(config.router.name)
    nothing_over = (
        router.item.form.is_dense or router.item.form.is_mixture or Capacity.from_layout(config.layout).is_dropless
    )
    if config.layout.overflow == "reroute" and not router.facts.makes_scores and not nothing_over:
        raise UsageError(
            f"layout.overflow: 'reroute' needs scores, which router '{config.router.name}' does not make"
            " (allowed: drop, pass)"
        )


def _check_spread(config: CellConfig) -> None:
    """Refuse a mesh over which the experts of some layer cannot be dealt out evenly."""
    if config.parallel.expert == 1 or ROUTERS.get(config.router.name).item.form.is_dense:
        return
    if ROUTERS.get(config.router.name).item.form.is_merged:
        raise UsageError(
            f"parallel.expert={config.parallel.expert}: router '{config.router.name}' merges the parameters of all"
            " experts, so every process needs them (allowed: parallel.expert=1 and parallel.data)"
        )
    for block in plan_blocks(config):
        for experts in block.banks:
            check_spread(experts, config.parallel.expert, config.layout.name)


def _check_together(config: CellConfig) -> None:
    """Refuse batches that cannot be divided into the groups of sequences for which the arm's cost is counted."""
    together = ROUTERS.get(config.router.name).item.sequence_group_size(config.router)
    size = config.train.batch_size // config.train.accumulate
    if size % together:
        cut = f" in train.accumulate={config.train.accumulate} parts" if config.train.accumulate > 1 else ""
        raise UsageError(
            f"train.batch_size={config.train.batch_size}{cut} does not divide into groups of {together} sequences,"
            f" which router '{config.router.name}' mixes (allowed: a multiple of {together * config.train.accumulate},"
            " or another router.group_size)"
        )


def _check_labels(config: CellConfig) -> None:
    """Refuse a router that reads labels where there are none."""
    router = ROUTERS.get(config.router.name)
    if router.facts.needs_labels and not TASKS.get(config.task.name, where="task.name").facts.labels:
        known = ", ".join(entry.name for entry in TASKS.entries() if entry.facts.labels)
        raise UsageError(
            f"router.name: '{config.router.name}' reads the right expert of each token, which task"
            f" '{config.task.name}' does not know (tasks that do: {known})"
        )


def _check_halves(config: CellConfig) -> None:
    """Refuse to choose a half of a model that has no two, and experts that cannot read an encoder."""
    two = TASKS.get(config.task.name, where="task.name").facts.is_encoder_decoder
    if not two and config.layout.experts_in != "both":
        raise UsageError(
            f"layout.experts_in: '{config.layout.experts_in}' is a half of an encoder-decoder model, which task"
            f" '{config.task.name}' does not train (allowed: both)"
        )
    if two and ROUTERS.get(config.router.name).item.embedding(config.router)[0]:
        raise UsageError(
            f"router.embedding: 'shared' is one network before all layers, and task '{config.task.name}' trains a model"
            " of two halves (allowed: layer)"
        )
    if two and any(block.stack for block in plan_blocks(config)):
        raise UsageError(
            f"layout.name: the experts of layout '{config.layout.name}' are whole models, which do not read an encoder;"
            f" task '{config.task.name}' needs a layout of experts inside blocks"
        )


def _experts_must_be_causal(config: CellConfig) -> bool:
    """Whether experts stand where later tokens must not be seen: an encoder may see all of its sequence."""
    facts = TASKS.get(config.task.name).facts
    return facts.causal and not (facts.is_encoder_decoder and config.layout.experts_in == "encoder")


def _leak(config: CellConfig) -> str | None:
    """Return how a token's output comes to depend on later tokens, None when it does not."""
    router, capacity = ROUTERS.get(config.router.name), Capacity.from_layout(config.layout)
    named = f"router.name: '{config.router.name}' is not causal"
    if not router.facts.causality.causal:
        return f"{named}: {router.facts.causality.reason}"
    if router.item.form.is_dense or router.item.form.is_mixture or capacity.is_dropless:
        return None
    if router.facts.causality.batch_dependent and not router.facts.causality.draws_in_evaluation:
        return f"{named} with a capacity: a place depends on other sequences, which look at later tokens (no capacity)"
    if capacity.drop_order in ("score", "priority", "random"):
        return f"layout.drop_order: '{capacity.drop_order}' lets later tokens push out earlier ones (try position)"
    if capacity.overflow == "reroute":
        return "layout.overflow: 'reroute' sends earlier tokens only where later ones leave a slot (try drop or pass)"
    if capacity.drop_order == "router" and not router.facts.causality.is_causal(with_capacity=True):
        return f"{named} with a capacity and its own order of dropping (try layout.drop_order=position)"
    return None
