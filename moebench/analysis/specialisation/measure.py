"""What the experts of one run say about labels: information by kind of label and layer, beside its controls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebench.analysis.specialisation.layer_information import ControlledLayer, LayerInformation, measure_layer
from moebench.analysis.specialisation.routed_tokens import (
    DEFAULT_TOKENS,
    route_batches,
    select_batches,
)
from moebench.analysis.specialisation.token_labels import LabelColumn, build_label_columns, read_token_ids
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import build_unknown_error
from moebench.tasks.speech import Speech

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
    chosen = select_batches(run.task, run.config.train.batch_size, options.max_tokens)
    batches = [batch for _, batch in chosen.batches]
    keeps_outputs = isinstance(run.task, Speech)  # of text they are large
    trained, outputs = route_batches(run.load_model(), chosen.batches, run.config, keeps_outputs=keeps_outputs)
    untrained, _ = route_batches(run.build_untrained_model(), chosen.batches, run.config)
    kinds: dict[str, dict[str, LayerInformation]] = {}
    for stack, tokens in trained.items():
        columns = build_label_columns(run.task, batches, stack, tokens, outputs)
        measured = _select_columns(columns, options.label)
        read = read_token_ids(run.task, [batch.decoder_batch for batch in batches] if stack == "decoder" else batches)
        layers = [
            ControlledLayer.build(name, tokens, untrained[stack].layers[name].assignments, read, run.seed)
            for name in tokens.layers
        ]
        for column in measured.values():
            by_layer = {layer.name: measure_layer(layer, column, options.num_permutations) for layer in layers}
            kinds.setdefault(column.name, {}).update(by_layer)
    return RunInformation(
        id=run.folder.path.name,
        arm=run.arm,
        seed=run.seed,
        num_tokens=sum(len(tokens.sequence_T) for tokens in trained.values()),
        num_batches_left_out=chosen.num_left_out,
        kinds=kinds,
    )


def _select_columns(columns: Mapping[str, LabelColumn], label: str | None) -> dict[str, LabelColumn]:
    if label is None:
        return dict(columns)
    if label not in columns:
        raise build_unknown_error("--label", label, columns)
    return {label: columns[label]}
