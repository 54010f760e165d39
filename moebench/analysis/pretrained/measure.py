"""The information between experts and labels of a model of transformers, by the estimators and controls of a run."""

from dataclasses import dataclass

from moebench.analysis.pretrained.collect import LayerAssignments
from moebench.analysis.pretrained.labels import compress_ids
from moebench.analysis.pretrained.probe import PretrainedProbe, to_assignments
from moebench.analysis.specialisation.control_routing import route_by_hash, route_randomly
from moebench.analysis.specialisation.given_token import measure_given_token
from moebench.analysis.specialisation.information import (
    Assignments,
    Ints,
    measure_information,
)
from moebench.analysis.specialisation.measure import LayerInformation, ProbeOptions, RunInformation
from moebench.analysis.specialisation.permutations import permute_sequences
from moebench.analysis.specialisation.token_labels import LabelColumn
from moebench.errors import unknown
from moebench.seeds import derive_seed

CONTROL_SHARE = 5
"""A control has this part of the permutations: their mean corrects it, and no interval of it is shown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _ControlledLayer:
    """A layer with its controls: routers drawn again, experts by a hash of the token, and random ones."""

    name: str
    trained: Assignments
    controls: dict[str, Assignments]
    sequence_T: Ints
    token_ids: tuple[Ints, int]
    """Number of each token among those that occur, and their number."""


def measure_pretrained(probe: PretrainedProbe, options: ProbeOptions) -> RunInformation:
    """Return the information of all layers about all kinds of labels, or about one of them.

    The control `untrained` is the choice of each router with its weights drawn again, on the same input: the model
    below it is the trained one, so that only what the router learned differs. Raises UsageError for an unknown kind.
    """
    kinds: dict[str, dict[str, LayerInformation]] = {}
    columns = {stack: probe.columns(stack) for stack in probe.stacks}
    known = {name for of_stack in columns.values() for name in of_stack}
    if options.label is not None and options.label not in known:
        raise unknown("--label", options.label, known)
    for stack in probe.stacks:
        layers = [_add_controls(layer, probe) for layer in probe.list_layers(stack)]
        for name, column in columns[stack].items():
            if options.label in (None, name):
                kinds.setdefault(name, {}).update({layer.name: _measure(layer, column, options) for layer in layers})
    return RunInformation(
        id=str(probe.folder.path),
        arm=probe.folder.family.title,
        seed=0,
        num_tokens=sum(len(probe.collection.counted(stack)) for stack in probe.stacks),
        num_batches_left_out=0,
        kinds=kinds,
    )


def _add_controls(layer: LayerAssignments, probe: PretrainedProbe) -> _ControlledLayer:
    counted = probe.collection.counted(layer.name.half)
    occurring, index_T = compress_ids(counted.token_N)
    trained = to_assignments(layer.expert_NK, layer.num_experts)
    draw = derive_seed("probe", str(layer.name))
    return _ControlledLayer(
        name=str(layer.name),
        trained=trained,
        controls={
            "untrained": to_assignments(layer.random_NK, layer.num_experts),
            "hash": route_by_hash(index_T, len(occurring), trained, draw),
            "random": route_randomly(trained, draw),
        },
        sequence_T=counted.sequence_N.numpy(),
        token_ids=(index_T, len(occurring)),
    )


def _measure(layer: _ControlledLayer, column: LabelColumn, options: ProbeOptions) -> LayerInformation:
    label_T, num_labels = column.label_T, len(column.values)
    permute = permute_sequences(label_T, layer.sequence_T)
    sampling = options.num_permutations, derive_seed("probe", layer.name, column.name)
    num_of_controls = max(1, options.num_permutations // CONTROL_SHARE)
    return LayerInformation(
        trained=measure_information(label_T, num_labels, layer.trained, permute, sampling),
        controls={
            name: measure_information(label_T, num_labels, assignments, permute, (num_of_controls, sampling[1]))
            for name, assignments in layer.controls.items()
        },
        given_token=measure_given_token(column, layer.trained, layer.token_ids, layer.sequence_T, sampling),
    )
