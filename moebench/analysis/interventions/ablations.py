"""What the quality of a trained model owes to each expert and to each router: interventions on a fixed probe set."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moebench.analysis.dynamics.probe_set import ProbeSet
from moebench.analysis.interventions.effect import Effect, Predictions, compute_losses
from moebench.analysis.interventions.routing_changes import (
    change_routing,
    drop_expert,
    replace_routers,
    shuffle_tokens,
)
from moebench.analysis.trained_run import TrainedRun, run_batches
from moebench.errors import build_unknown_error
from moebench.experts.layer import MoELayer
from moebench.routing.router import ROUTERS, Form, Router
from moebench.seeds import derive_seed, make_generator
from moebench.tasks.task import TASKS
from moebench.training.kept_weights import list_kept_weights
from moebench.training.model import Model

Kind = Literal["expert", "shuffled", "random", "step"]
ALL_LAYERS = "all"
NUM_RANDOM = 3
"""Random routers, and random orders of tokens: the effect is the mean over them."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is changed."""

    kind: Kind
    layer: str
    """A layer, or `ALL_LAYERS`."""
    expert: int | None = None
    """The expert that is left out."""
    step: int | None = None
    """The step whose router replaces that of the trained model; 0: the untrained one."""

    @property
    def name(self) -> str:
        """Name of the change, without the layer."""
        names = {"shuffled": "tokens shuffled", "random": "random router", "expert": f"expert {self.expert}"}
        return names.get(self.kind, f"router of step {self.step}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablation:
    """An intervention and its effect."""

    target: Target
    effect: Effect
    by_label: Mapping[str, Mapping[str, Effect]]
    """Kind -> label -> effect on the predictions with that label."""
    quality: Mapping[str, float]
    """Metrics of the task under the intervention."""
    share: float | None = None
    """Share of the layer's assignments that go to the expert; None for routers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablations:
    """All interventions on a model."""

    title: str
    probe_set: ProbeSet
    metric: str
    loss: float
    """Mean loss of the model as trained, in nats per prediction."""
    quality: Mapping[str, float]
    """Metrics of the task of the model as trained, on the probe set."""
    routers: Sequence[Ablation]
    experts: Sequence[Ablation]
    notes: tuple[str, ...]

    @property
    def num_label_tests(self) -> int:
        """Pairs of an expert and a label that have an interval."""
        effects = [effect for each in self.experts for labels in each.by_label.values() for effect in labels.values()]
        return sum(effect.error is not None for effect in effects)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "probe_set": self.probe_set.to_dict(),
            "loss": self.loss,
            "quality": dict(self.quality),
            "routers": [self._describe(each, len(self.routers)) for each in self.routers],
            "experts": [self._describe(each, len(self.experts)) for each in self.experts],
            "notes": list(self.notes),
        }

    def _describe(self, ablation: Ablation, num_comparisons: int) -> dict[str, Any]:
        target = ablation.target
        labels = {
            kind: {label: effect.to_dict(self.num_label_tests) for label, effect in effects.items()}
            for kind, effects in ablation.by_label.items()
        }
        return {
            "layer": target.layer,
            "kind": target.kind,
            "expert": target.expert,
            "step": target.step,
            "share": ablation.share,
            **ablation.effect.to_dict(num_comparisons),
            "quality": dict(ablation.quality),
            "by_label": labels,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Intervention:
    """A target, and for each of its draws a context in which the model is changed."""

    target: Target
    contexts: Sequence[Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """The losses and the metrics of a model on a probe set."""

    losses: Sequence[Tensor]
    quality: Mapping[str, float]


def measure_ablations(
    run: TrainedRun, num_tokens: int, on_progress: Callable[[int, int], None], label: str | None = None
) -> Ablations:
    """Measure the model as trained and under every intervention that its routers allow.

    Raises UsageError, before anything is measured, if predictions have no labels of the kind `label`.
    """
    probe_set = ProbeSet.draw(run.task, run.config.train.batch_size, num_tokens)
    predictions = Predictions.of(run.task, probe_set.batches)
    if label is not None and label not in predictions.labels:
        raise build_unknown_error("--label", label, predictions.labels)
    model = run.load_model()
    layers = {str(layer.name): layer for layer in model.backbone.moe_layers()}
    interventions, notes = _list_interventions(run, layers)
    trained, share = _measure(model, run, probe_set), _measure_shares(model, run, probe_set)
    ablations = []
    for number, intervention in enumerate(interventions):
        on_progress(number, len(interventions))
        measured = [_measure(model, run, probe_set, context()) for context in intervention.contexts]
        ablations.append(_compare(intervention.target, trained, measured, predictions, share))
    total = sum(float(nats_BP.sum()) for nats_BP in trained.losses)
    return Ablations(
        title=f"{run.arm}, seed {run.seed}",
        probe_set=probe_set,
        metric=TASKS.get(run.config.task.name).facts.metric,
        loss=total / sum(float(count_BP.sum()) for count_BP in predictions.count),
        quality=trained.quality,
        routers=[each for each in ablations if each.target.kind != "expert"],
        experts=[each for each in ablations if each.target.kind == "expert"],
        notes=tuple(notes),
    )


def _list_interventions(run: TrainedRun, layers: Mapping[str, MoELayer]) -> tuple[list[_Intervention], list[str]]:
    """Return the interventions on routers, then those on experts, and notes on what does not apply."""
    form, name, notes = ROUTERS.get(run.config.router.name).item.form, run.config.router.name, []
    scopes = [*((layer,) for layer in layers), *([tuple(layers)] if len(layers) > 1 else [])]
    interventions: list[_Intervention] = []
    if form is Form.LIST:
        interventions += [_shuffle({layer: layers[layer] for layer in scope}, len(layers)) for scope in scopes]
    else:
        notes.append(f"tokens are not shuffled: '{name}' makes no list of assignments")
    routers, damaged = _load_other_routers(run, layers)
    notes += damaged
    if not routers:
        notes.append(f"routers are not replaced: '{name}' is a fixed function, without anything that training changes")
    for (kind, step), draws in routers.items():
        for scope in scopes:
            target = Target(kind=kind, layer=_name_scope(scope, len(layers)), step=step)
            changed = {layer: layers[layer] for layer in scope}
            interventions.append(
                _Intervention(target=target, contexts=[partial(replace_routers, changed, draw) for draw in draws])
            )
    if form in (Form.LIST, Form.SOFT):
        interventions += [
            _drop(layer, layers[layer], expert) for layer in layers for expert in range(layers[layer].bank.num_experts)
        ]
    else:
        reason = "an expert is a step of a chain" if form.is_chain else "experts are summed into one network"
        notes.append(f"no expert is left out: with '{name}' {reason}")
    return interventions, notes


def _name_scope(scope: Sequence[str], num_layers: int) -> str:
    return ALL_LAYERS if len(scope) == num_layers > 1 else scope[0]


def _shuffle(layers: Mapping[str, MoELayer], num_layers: int) -> _Intervention:
    layer = _name_scope([*layers], num_layers)

    def begin(draw: int) -> AbstractContextManager[None]:
        generator = make_generator("shuffled routing", layer, draw)
        return change_routing(layers, lambda routing, ctx: shuffle_tokens(routing, ctx.valid_T, generator))

    contexts = [partial(begin, draw) for draw in range(NUM_RANDOM)]
    return _Intervention(target=Target(kind="shuffled", layer=layer), contexts=contexts)


def _drop(name: str, layer: MoELayer, expert: int) -> _Intervention:
    begin = partial(change_routing, {name: layer}, lambda routing, ctx: drop_expert(routing, expert))
    return _Intervention(target=Target(kind="expert", layer=name, expert=expert), contexts=[begin])


Routers = dict[tuple[Kind, int | None], list[dict[str, Router]]]


def _load_other_routers(run: TrainedRun, layers: Mapping[str, MoELayer]) -> tuple[Routers, list[str]]:
    """Return routers as other seeds draw them, and those of each kept step; none where all are as the trained ones."""
    kept, damaged = list_kept_weights(run.folder)
    seeds = [derive_seed("random router", run.config.seed, draw) % 2**31 for draw in range(NUM_RANDOM)]
    routers: Routers = {("random", None): [_take_routers(run.build_untrained_model(seed)) for seed in seeds]}
    trained = {name: layer.router for name, layer in layers.items()}
    if all(_are_equal(draw[name], router) for draw in routers["random", None] for name, router in trained.items()):
        return {}, []
    routers["step", 0] = [_take_routers(run.build_untrained_model())]
    for step, path in sorted(kept.items()):
        routers["step", step] = [_take_routers(run.load_model_at(path))]
    return routers, [f"{path}: damaged ({problem}); left out" for path, problem in damaged.items()]


def _take_routers(model: Model) -> dict[str, Router]:
    return {str(layer.name): layer.router.eval() for layer in model.backbone.moe_layers()}


def _are_equal(first: Router, second: Router) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def _measure(
    model: Model, run: TrainedRun, probe_set: ProbeSet, change: AbstractContextManager[None] | None = None
) -> _Measured:
    """Measure the model inside a context that changes it, or as it is."""
    task, losses, sums = run.task, [], dict[str, Tensor]()
    with change or nullcontext():
        for batch, output, _ in run_batches(model, enumerate(probe_set.batches), run.config):
            losses.append(compute_losses(task, output, batch))
            for name, value in task.compute_sums(output, batch).items():
                zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64)
                sums[name] = sums.get(name, zeros).index_add(0, batch.domain_B.cpu(), value.double().cpu())
    return _Measured(losses=losses, quality=task.compute_quality(sums))


def _measure_shares(model: Model, run: TrainedRun, probe_set: ProbeSet) -> dict[str, Tensor]:
    """Return MoE layer -> the share of its assignments, or of its weights, that each expert has."""
    totals: dict[str, Tensor] = {}
    for _, _, records in run_batches(model, enumerate(probe_set.batches), run.config):
        for record in records:
            label_T = torch.zeros(record.routing.num_tokens, dtype=torch.int64, device=next(model.parameters()).device)
            table_E = record.routing.tabulate_labels(label_T, 1)[0].cpu()
            totals[str(record.layer)] = totals.get(str(record.layer), torch.zeros_like(table_E)) + table_E
    return {layer: total_E / total_E.sum().clamp(min=1e-300) for layer, total_E in totals.items()}


def _compare(
    target: Target,
    trained: _Measured,
    measured: Sequence[_Measured],
    predictions: Predictions,
    share: Mapping[str, Tensor],
) -> Ablation:
    changes = [
        torch.stack(draws).mean(0) - before_BP
        for before_BP, *draws in zip(trained.losses, *(each.losses for each in measured), strict=True)
    ]
    quality = {name: sum(each.quality[name] for each in measured) / len(measured) for name in trained.quality}
    return Ablation(
        target=target,
        effect=predictions.compute_effect(changes),
        by_label=predictions.compute_label_effects(changes),
        quality=quality,
        share=None if target.expert is None else float(share[target.layer][target.expert]),
    )
