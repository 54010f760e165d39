"""How routing and experts of one run changed in training, measured at its kept checkpoints on a fixed probe set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moebench.analysis.dynamics.measures import (
    average_strongest_partner,
    compute_agreement,
    compute_chance_agreement,
    compute_coactivation,
    compute_matched_similarity,
    compute_pair_similarity,
    find_changed_tokens,
    find_last_changes,
    list_expert_weights,
    swap_experts,
)
from moebench.analysis.dynamics.probe_set import ProbeSet, collect_memberships
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.seeds import make_generator
from moebench.training.kept_weights import list_kept_weights
from moebench.training.model import Model

Progress = Callable[[int, int], None]
NUM_RANDOM = 8
"""Random routings that co-activation is compared with."""
BURN_IN_ROUNDS, ROUNDS_BETWEEN = 40, 10
MAX_SHOWN_EXPERTS = 32
"""Experts in the stored table of co-activation, those with the strongest partners, as in OLMoE's figure 21."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMeasure:
    """One layer at one checkpoint."""

    step: int
    saturation: float
    """Agreement with the experts that the trained model chooses."""
    chance: float
    """What the saturation would be if the two routings were independent, with these loads."""
    churn: float | None
    """One minus the agreement with the checkpoint before; None at the first."""
    changed_tokens: float | None
    """Share of tokens whose experts are not exactly those of the checkpoint before; None at the first."""
    still_changing: float | None
    """Share of tokens whose experts change at a later checkpoint; None at the last."""
    pair_similarity: float | None
    """Mean cosine of the weights of two experts; None without a pair of one shape."""
    matched_similarity: float | None
    """Mean cosine of the weights of each expert with its own in the trained model; None without weights."""
    coactivation: float | None
    """Mean over experts of the share of its tokens that its strongest partner has, too; None for one expert a token."""
    random_coactivation: tuple[float, ...]
    """Co-activation of random routings with the loads and numbers of experts of this checkpoint."""

    @property
    def random_mean(self) -> float | None:
        """Mean of `random_coactivation`; None where there is none."""
        values = self.random_coactivation
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerHistory:
    """One MoE layer over the checkpoints."""

    num_experts: int
    checkpoints: tuple[CheckpointMeasure, ...]
    strongest_experts: tuple[int, ...]
    """Experts of the table below."""
    coactivation_EE: Tensor
    """Co-activation in the trained model: row i has the shares of the tokens of expert i that the others have."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "num_experts": self.num_experts,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "coactivation": {"experts": list(self.strongest_experts), "share": self.coactivation_EE.tolist()},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """All MoE layers of a run over its checkpoints."""

    title: str
    probe_set: ProbeSet
    layers: Mapping[str, LayerHistory]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"probe_set": self.probe_set.to_dict(), "layers": layers, "notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """What is kept of one checkpoint."""

    step: int
    members: Mapping[str, Tensor]
    weights: Mapping[str, Sequence[Tensor]]


def measure_history(run: TrainedRun, num_tokens: int, on_progress: Progress) -> History:
    """Measure the untrained model, the kept checkpoints and the trained model of a run.

    Raises UsageError for a run without kept checkpoints.
    """
    kept, damaged = list_kept_weights(run.folder)
    if not kept:
        raise UsageError(
            f"--show history: run {run.folder.path.name} has no kept checkpoints"
            " (train.keep_checkpoints=[1%,5%,20%,50%] keeps them; remove the run and train it again)"
        )
    train = run.config.train
    probe_set = ProbeSet.draw(run.task, train.batch_size, num_tokens)
    loads: dict[int, Callable[[], Model]] = {0: run.build_untrained_model}
    loads |= {step: (lambda path=path: run.load_model_at(path)) for step, path in sorted(kept.items())}  # type: ignore[misc]
    loads[train.steps] = run.load_model
    snapshots = []
    for number, (step, load) in enumerate(loads.items()):
        on_progress(number, len(loads))
        snapshots.append(_take_snapshot(step, load(), probe_set, run))
    notes = [f"{path}: damaged ({problem}); left out" for path, problem in damaged.items()]
    return History(
        title=f"{run.arm}, seed {run.seed}",
        probe_set=probe_set,
        layers={layer: _measure_layer(layer, snapshots) for layer in snapshots[-1].members},
        notes=tuple(notes),
    )


def _take_snapshot(step: int, model: Model, probe_set: ProbeSet, run: TrainedRun) -> _Snapshot:
    members = collect_memberships(model, probe_set, run.config)
    layers = model.backbone.moe_layers()
    weights = {str(layer.name): [table.cpu() for table in list_expert_weights(layer.bank)] for layer in layers}
    return _Snapshot(step=step, members=members, weights=weights)


def _measure_layer(layer: str, snapshots: Sequence[_Snapshot]) -> LayerHistory:
    tables = [snapshot.members[layer] for snapshot in snapshots]
    weights = [snapshot.weights[layer] for snapshot in snapshots]
    last_changes = [*find_last_changes(tables), None]
    checkpoints = []
    for position, snapshot in enumerate(snapshots):
        table, before = tables[position], tables[position - 1] if position else None
        coactivation = average_strongest_partner(table)
        checkpoints.append(
            CheckpointMeasure(
                step=snapshot.step,
                saturation=compute_agreement(table, tables[-1]),
                chance=compute_chance_agreement(table, tables[-1]),
                churn=None if before is None else 1 - compute_agreement(before, table),
                changed_tokens=(None if before is None else float(find_changed_tokens(before, table).double().mean())),
                still_changing=last_changes[position],
                pair_similarity=compute_pair_similarity(weights[position]),
                matched_similarity=compute_matched_similarity(weights[position], weights[-1]),
                coactivation=coactivation,
                random_coactivation=() if coactivation is None else draw_random_coactivation(table, layer),
            )
        )
    strongest, share_EE = _select_strongest(compute_coactivation(tables[-1]))
    return LayerHistory(
        num_experts=tables[-1].shape[1],
        checkpoints=tuple(checkpoints),
        strongest_experts=strongest,
        coactivation_EE=share_EE,
    )


def draw_random_coactivation(member_TE: Tensor, layer: str, count: int = NUM_RANDOM) -> tuple[float, ...]:
    """Return the co-activation of random routings with the same loads and the same number of experts of each token."""
    generator, values = make_generator("random routing", layer), []
    table = swap_experts(member_TE, generator, BURN_IN_ROUNDS)
    for _ in range(count):
        table = swap_experts(table, generator, ROUNDS_BETWEEN)
        value = average_strongest_partner(table)
        assert value is not None  # the numbers of experts of tokens are those of `member_TE`
        values.append(value)
    return tuple(values)


def _select_strongest(share_EE: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the experts with the strongest partners, ascending, and their part of the table, with 0 for NaN."""
    others_EE = share_EE.nan_to_num(0.0).fill_diagonal_(0.0)
    order = others_EE.max(1).values.argsort(descending=True, stable=True)[:MAX_SHOWN_EXPERTS].sort().values
    return tuple(order.tolist()), share_EE.nan_to_num(0.0)[order][:, order].clone()
