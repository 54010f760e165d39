"""The probe of a model of transformers as tables."""

from typing import Any

import torch

from moebench.analysis.dynamics.history import draw_random_coactivation
from moebench.analysis.dynamics.measures import average_strongest_partner, compute_coactivation
from moebench.analysis.pretrained.collect import LayerAssignments
from moebench.analysis.pretrained.probe import PretrainedProbe
from moebench.errors import build_unknown_error
from moebench.reporting.formatting import MISSING, format_bytes, format_count, format_number, format_percent
from moebench.reporting.table import Column, Table
from moebench.routing.metrics import compute_normalised_entropy, count_dead_experts, max_violation
from moebench.training.label_tables import MAX_STORED_LABELS, LabelTable

NUM_PAIRS = 3
"""Pairs of experts that the table names for each layer."""
LOAD_NOTES = (
    "busiest: load of the busiest expert over the mean load; dead: experts with less than 1 % of it; even: entropy of"
    " the loads / ln E; router entropy: of the softmax of the logits, in nats (even: ln E);",
    "dropped: assignments beyond the capacity (Switch); together: mean over experts of the share of their tokens that"
    " their most frequent partner has too, and the same for random routings with these loads (docs/pretrained.md)",
)


def describe_model(probe: PretrainedProbe) -> tuple[str, ...]:
    """Return the lines that say what was probed, and how good the model is on the text."""
    first, collection = probe.collection.layers[0], probe.collection
    tokens = sum(len(collection.select_tokens(stack)) for stack in probe.stacks)
    quality = f"{collection.nats:.3f} nats per token"
    if collection.bits_per_byte is not None:
        quality = f"{collection.bits_per_byte:.3f} bits per byte, {quality}"
    size = probe.folder.num_parameters
    lines = [
        f"{probe.folder.family.title}: {format_count(size)} parameters"
        f" ({format_bytes(size * probe.dtype.itemsize)} in {str(probe.dtype).removeprefix('torch.')}),"
        f" {len(collection.layers)} MoE layers of {first.num_experts} experts, {first.expert_NK.shape[1]} per token",
        f"{tokens:,} tokens in {len(collection.text.domain_B):,} sequences of {len(collection.text.domains)} domains:"
        f" {quality}",
    ]
    if probe.unused:
        lines.append(f"{len(probe.unused)} weights of the files are not used: {probe.unused[0]} ...")
    return tuple(lines)


def tabulate_labels(probe: PretrainedProbe, label: str | None = None) -> dict[str, LabelTable]:
    """Return assignments by label and expert, of every kind with few labels or of the given one."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    values: dict[str, tuple[str, ...]] = {}
    for stack in probe.stacks:
        for name, column in probe.columns(stack).items():
            if label != name and (label is not None or len(column.values) > MAX_STORED_LABELS):
                continue
            if values.setdefault(name, column.values) != column.values:
                continue  # the ids that occur in a decoder are others; its layers have no common rows
            label_N = torch.from_numpy(column.label_T)
            tables = {
                str(layer.name): count_labels(layer, label_N, len(column.values)) for layer in probe.list_layers(stack)
            }
            layers.setdefault(name, {}).update(tables)
    return {name: LabelTable(values=values[name], layers=tables) for name, tables in layers.items()}


def count_labels(layer: LayerAssignments, label_N: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return the assignments of each label to each expert before capacity, fp64 [labels, E]."""
    key_NK = label_N[:, None] * layer.num_experts + layer.expert_NK
    counts = torch.bincount(key_NK.flatten(), minlength=num_labels * layer.num_experts)
    return counts.double().view(num_labels, layer.num_experts)


def require_layer(probe: PretrainedProbe, layer: str | None) -> None:
    """Raise UsageError for a layer that the model does not have."""
    names = [str(each.name) for each in probe.collection.layers]
    if layer is not None and layer not in names:
        raise build_unknown_error("--layer", layer, names)


def measure_loads(probe: PretrainedProbe) -> dict[str, dict[str, Any]]:
    """Return load and co-activation of each layer, as JSON-ready values."""
    return {str(layer.name): _measure_layer(layer) for layer in probe.collection.layers}


def _measure_layer(layer: LayerAssignments) -> dict[str, Any]:
    load_E = torch.bincount(layer.expert_NK.flatten(), minlength=layer.num_experts)
    member_TE = torch.zeros(len(layer.expert_NK), layer.num_experts, dtype=torch.bool)
    member_TE.scatter_(1, layer.expert_NK, True)
    together = average_strongest_partner(member_TE)
    random = draw_random_coactivation(member_TE, str(layer.name)) if together is not None else ()
    return {
        "load": load_E.tolist(),
        "dropped": int((~layer.is_kept_NK).sum()),
        "max_violation": max_violation(load_E),
        "dead_experts": count_dead_experts(load_E),
        "load_entropy": compute_normalised_entropy(load_E),
        "router_entropy_nats": layer.entropy,
        "coactivation": together,
        "random_coactivation": list(random),
        "pairs": _list_pairs(member_TE),
    }


def _list_pairs(member_TE: torch.Tensor) -> list[dict[str, Any]]:
    """Return the pairs of experts that most often share the tokens of the first one."""
    share_EE = compute_coactivation(member_TE).nan_to_num(0.0).fill_diagonal_(0.0)
    order = share_EE.flatten().argsort(descending=True, stable=True)[:NUM_PAIRS].tolist()
    pairs = [(index // len(share_EE), index % len(share_EE)) for index in order]
    return [
        {"expert": expert, "partner": partner, "share": float(share_EE[expert, partner])}
        for expert, partner in pairs
        if share_EE[expert, partner] > 0
    ]


def build_load_table(loads: dict[str, dict[str, Any]], layer: str | None = None) -> Table:
    """Return a row for each layer, or of one layer."""
    headers = ("busiest", "dead", "even", "router entropy", "dropped", "together", "at random")
    return Table(
        title="Load and co-activation of the experts",
        columns=(
            Column(header="layer", align="left", is_key=True),
            *(Column(header=header) for header in headers),
            Column(header="strongest pairs", align="left", wraps=True),
        ),
        rows=tuple(_build_load_row(name, values) for name, values in loads.items() if layer in (None, name)),
        notes=LOAD_NOTES,
    )


def _build_load_row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    random = values["random_coactivation"]
    pairs = [f"{pair['expert']}→{pair['partner']} {100 * pair['share']:.0f} %" for pair in values["pairs"]]
    return (
        name,
        f"{1 + values['max_violation']:.2f} ×",
        str(values["dead_experts"]),
        f"{values['load_entropy']:.3f}",
        format_number(values["router_entropy_nats"]),
        format_percent(values["dropped"] / max(sum(values["load"]), 1)),
        format_percent(values["coactivation"]),
        format_percent(sum(random) / len(random)) if random else MISSING,
        ", ".join(pairs) or MISSING,
    )
