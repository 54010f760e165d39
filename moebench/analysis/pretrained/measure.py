"""The information between experts and labels of a model of transformers, by the estimators and controls of a run."""

from moebench.analysis.pretrained.labels import compress_ids
from moebench.analysis.pretrained.probe import PretrainedProbe, to_assignments
from moebench.analysis.specialisation.layer_information import ControlledLayer, LayerInformation, measure_layer
from moebench.analysis.specialisation.measure import ProbeOptions, RunInformation
from moebench.errors import build_unknown_error

CONTROL_SHARE = 5
"""A control has this part of the permutations: their mean corrects it, and no interval of it is shown."""
SEED = 0
"""Of permutations and controls: a checkpoint does not say which seed it was trained with."""


def measure_pretrained(probe: PretrainedProbe, options: ProbeOptions) -> RunInformation:
    """Return the information of all layers about all kinds of labels, or about one of them.

    The control `untrained` is the choice of each router with its weights drawn again, on the same input: the model
    below it is the trained one, so that only what the router learned differs. Raises UsageError for an unknown kind.
    """
    kinds: dict[str, dict[str, LayerInformation]] = {}
    columns = {stack: probe.columns(stack) for stack in probe.stacks}
    known = {name for of_stack in columns.values() for name in of_stack}
    if options.label is not None and options.label not in known:
        raise build_unknown_error("--label", options.label, known)
    num_of_controls = max(1, options.num_permutations // CONTROL_SHARE)
    for stack in probe.stacks:
        layers = _add_controls(probe, stack)
        for name, column in columns[stack].items():
            if options.label in (None, name):
                by_layer = {
                    layer.name: measure_layer(layer, column, options.num_permutations, num_of_controls)
                    for layer in layers
                }
                kinds.setdefault(name, {}).update(by_layer)
    return RunInformation(
        id=str(probe.folder.path),
        arm=probe.folder.family.title,
        seed=SEED,
        num_tokens=sum(len(probe.collection.select_tokens(stack)) for stack in probe.stacks),
        num_batches_left_out=0,
        kinds=kinds,
    )


def _add_controls(probe: PretrainedProbe, stack: str | None) -> list[ControlledLayer]:
    occurring, index_T = compress_ids(probe.collection.select_tokens(stack).token_N)
    tokens, token_ids = probe.to_routed_tokens(stack), (index_T, len(occurring))
    return [
        ControlledLayer.build(
            str(layer.name), tokens, to_assignments(layer.random_NK, layer.num_experts), token_ids, SEED
        )
        for layer in probe.list_layers(stack)
    ]
