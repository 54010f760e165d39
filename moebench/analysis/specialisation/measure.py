"""What the experts of one run say about labels: information by kind of label and layer, beside its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench.analysis.specialisation.control_routing import route_by_hash, route_randomly
from moebench.analysis.specialisation.given_token import measure_given_token
from moebench.analysis.specialisation.information import (
    Assignments,
    Information,
    Ints,
    measure_information,
)
from moebench.analysis.specialisation.permutations import permute_sequences
from moebench.analysis.specialisation.routed_tokens import (
    DEFAULT_TOKENS,
    RoutedTokens,
    route_batches,
    select_batches,
)
from moebench.analysis.specialisation.token_labels import LabelColumn, build_label_columns, read_token_ids
from moebench.analysis.specialisation.trained_run import TrainedRun
from moebench.errors import unknown
from moebench.seeds import derive_seed
from moebench.tasks.speech import Speech
from moebench.tasks.task import Batch
from moebench.training.evaluation import training_precision
from moebench.training.model import Model

CONTROLS = ("untrained", "hash", "random")
DEFAULT_PERMUTATIONS = 100


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How much is measured."""

    max_tokens: int = DEFAULT_TOKENS
    """Positions of the test split, about."""
    num_permutations: int = DEFAULT_PERMUTATIONS
    label: str | None = None
    """The only kind of label; None: all."""


@dataclass(frozen=True, kw_only=True)
class LayerInformation:
    """Information of one layer about one kind of label."""

    trained: Information
    controls: dict[str, Information]
    """Control -> the same for its routing; without those that do not apply."""
    given_token: Information | None
    """Information given the token's id; None where it is not known (`measure_given_token`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        given = {} if self.given_token is None else {"given_token": self.given_token.to_dict()}
        return {
            **self.trained.to_dict(),
            **given,
            "controls": {name: control.to_dict() for name, control in self.controls.items()},
        }


@dataclass(frozen=True, kw_only=True)
class RunInformation:
    """Information of all layers of a run about all kinds of labels."""

    id: str
    arm: str
    seed: int
    num_tokens: int
    num_batches_left_out: int
    kinds: dict[str, dict[str, LayerInformation]]
    """Kind of label -> layer -> information."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        kinds = {
            kind: {layer: value.to_dict() for layer, value in layers.items()} for kind, layers in self.kinds.items()
        }
        return {
            "unit": "bits",
            "tokens": self.num_tokens,
            "batches_left_out": self.num_batches_left_out,
            "kinds": kinds,
        }


def measure_run(run: TrainedRun, options: ProbeOptions) -> RunInformation:
    """Route a part of the test split by the trained and by the untrained model, and measure both and the controls."""
    torch.set_num_threads(run.config.train.threads)
    chosen = select_batches(run.task, run.config.train.batch_size, options.max_tokens)
    batches = [batch for _, batch in chosen.batches]
    trained, outputs = _route(run, run.load_model(), chosen.batches)
    untrained, _ = _route(run, run.build_untrained_model(), chosen.batches)
    kinds: dict[str, dict[str, LayerInformation]] = {}
    for stack, tokens in trained.items():
        columns = build_label_columns(run.task, batches, stack, tokens, outputs)
        measured = _select_columns(columns, options.label)
        read = read_token_ids(run.task, [batch.decoder_batch for batch in batches] if stack == "decoder" else batches)
        layers = [_RoutedLayer.build(name, tokens, untrained[stack], read, run.seed) for name in tokens.layers]
        for column in measured.values():
            by_layer = {layer.name: _measure_layer(layer, column, options) for layer in layers}
            kinds.setdefault(column.name, {}).update(by_layer)
    return RunInformation(
        id=run.folder.path.name,
        arm=run.arm,
        seed=run.seed,
        num_tokens=sum(len(tokens.sequence_T) for tokens in trained.values()),
        num_batches_left_out=chosen.num_left_out,
        kinds=kinds,
    )


def _route(
    run: TrainedRun, model: Model, batches: Sequence[tuple[int, Batch]]
) -> tuple[dict[str, RoutedTokens], list[Tensor]]:
    with training_precision(run.config.train, run.device):
        keeps_outputs = isinstance(run.task, Speech)  # of text they are large
        return route_batches(model, batches, run.config.seed, run.device, keeps_outputs=keeps_outputs)


def _select_columns(columns: Mapping[str, LabelColumn], label: str | None) -> dict[str, LabelColumn]:
    if label is None:
        return dict(columns)
    if label not in columns:
        raise unknown("--label", label, columns)
    return {label: columns[label]}


@dataclass(frozen=True, kw_only=True, eq=False)
class _RoutedLayer:
    """One layer with its controls."""

    name: str
    seed: int
    sequence_T: Ints
    trained: Assignments
    controls: dict[str, Assignments]
    token_ids: tuple[Ints, int] | None

    @classmethod
    def build(
        cls, name: str, tokens: RoutedTokens, untrained: RoutedTokens, token_ids: tuple[Ints, int] | None, seed: int
    ) -> "_RoutedLayer":
        trained = tokens.layers[name].assignments
        draw = derive_seed("probe", seed, name)
        controls = {"untrained": untrained.layers[name].assignments}
        if token_ids is not None:
            controls["hash"] = route_by_hash(*token_ids, trained, draw)
        controls["random"] = route_randomly(trained, draw)
        return cls(
            name=name, seed=seed, sequence_T=tokens.sequence_T, trained=trained, controls=controls, token_ids=token_ids
        )


def _measure_layer(layer: _RoutedLayer, column: LabelColumn, options: ProbeOptions) -> LayerInformation:
    label_T, num_labels = column.label_T, len(column.values)
    permute = permute_sequences(label_T, layer.sequence_T)
    sampling = options.num_permutations, derive_seed("probe", layer.seed, column.name)  # in all layers the same
    return LayerInformation(
        trained=measure_information(label_T, num_labels, layer.trained, permute, sampling),
        controls={
            name: measure_information(label_T, num_labels, assignments, permute, sampling)
            for name, assignments in layer.controls.items()
        },
        given_token=(
            None
            if layer.token_ids is None
            else measure_given_token(column, layer.trained, layer.token_ids, layer.sequence_T, sampling)
        ),
    )
