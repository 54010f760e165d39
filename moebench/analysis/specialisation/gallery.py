"""The gallery of a layer: for each expert the inputs with the highest gates, as a figure and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebench.analysis.specialisation.gallery_figure import draw_gallery
from moebench.analysis.specialisation.information import Ints
from moebench.analysis.specialisation.routed_tokens import RoutedLayer, RoutedTokens, route_batches, select_batches
from moebench.analysis.specialisation.snippets import Snippets, read_image_patches, read_spectrograms
from moebench.analysis.specialisation.token_labels import LabelColumn, build_label_columns
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError, build_unknown_error
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table
from moebench.tasks.audio.task import AudioTask
from moebench.tasks.speech import Speech
from moebench.tasks.task import Batch
from moebench.tasks.vision import Vision

NUM_SNIPPETS = 8
"""Snippets of each expert, no two from one image or recording."""
MAX_EXPERTS = 16
"""Experts drawn: of more, those with the most assignments."""
MAX_LABELS = 2
"""Labels of each kind named for an expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertGallery:
    """What one expert takes."""

    expert: int
    share: float
    """Share of the assignments of the layer."""
    tokens: tuple[int, ...]
    """Tokens of the highest gates, from different sequences."""
    gates: tuple[float, ...]
    labels: dict[str, tuple[tuple[str, float], ...]]
    """Kind of label -> the most frequent labels, with their shares of the expert's assignments."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        labels = {kind: [list(pair) for pair in pairs] for kind, pairs in self.labels.items()}
        return {"expert": self.expert, "share": self.share, "gates": list(self.gates), "labels": labels}


def build_gallery_report(run: TrainedRun, layer: str | None, max_tokens: int, path: Path) -> Report:
    """Draw the gallery of one layer, by default the last; raise UsageError where inputs cannot be drawn."""
    if not isinstance(run.task, Vision | AudioTask):
        raise UsageError(
            f"--show gallery: the task {run.config.task.name} has neither images nor recordings (allowed: labels,"
            " and for text contexts)"
        )
    chosen = select_batches(run.task, run.config.train.batch_size, max_tokens)
    stacks, outputs = route_batches(
        run.load_model(), chosen.batches, run.config, keeps_outputs=isinstance(run.task, Speech)
    )
    if not stacks:
        raise UsageError(f"run {run.folder.path.name}: has no experts")
    batches, tokens = [batch for _, batch in chosen.batches], stacks[""]
    name = layer if layer is not None else [*tokens.layers][-1]
    if name not in tokens.layers:
        raise build_unknown_error("--layer", name, tokens.layers)
    columns = build_label_columns(run.task, batches, "", tokens, outputs)
    routed = tokens.layers[name]
    shown = sorted(np.argsort(-_count_experts(routed), kind="stable")[:MAX_EXPERTS].tolist())
    experts = [describe_expert(expert, routed, tokens.sequence_T, columns) for expert in shown]
    snippets = _read_snippets(run.task, batches, tokens, columns)
    draw_gallery(experts, snippets, path=path, title=f"Layer {name} of {run.arm}, seed {run.seed}: highest gates")
    table = _build_table(experts, [*columns], name)
    num_experts = routed.assignments.num_experts
    notes = (f"{len(experts)} of {num_experts} experts: those with the most assignments",)
    return Report(
        tables=(table,),
        notes=(f"figure: {path}", *(notes if len(experts) < num_experts else ())),
        values={"layer": name, "figure": str(path), "experts": [expert.to_dict() for expert in experts]},
    )


def _read_snippets(
    task: Vision | AudioTask, batches: Sequence[Batch], tokens: RoutedTokens, columns: Mapping[str, LabelColumn]
) -> Snippets:
    if isinstance(task, Vision):
        return read_image_patches(task, batches, tokens, columns)
    return read_spectrograms(task, batches, tokens, columns)


def _count_experts(layer: RoutedLayer) -> np.ndarray:
    assignments = layer.assignments
    return np.bincount(assignments.expert_N, assignments.share_N, assignments.num_experts)


def describe_expert(
    expert: int, layer: RoutedLayer, sequence_T: Ints, columns: Mapping[str, LabelColumn]
) -> ExpertGallery:
    """Return the share of an expert, its most frequent labels, and its highest gates."""
    assignments = layer.assignments
    mine_N = np.flatnonzero(assignments.expert_N == expert)
    token_N = assignments.token_N[mine_N]
    picked = pick_tokens(mine_N, layer, sequence_T)
    labels = {}
    for kind, column in columns.items():
        counts = Counter(column.label_T[token_N].tolist())
        labels[kind] = tuple(
            (column.values[label], count / len(mine_N)) for label, count in counts.most_common(MAX_LABELS)
        )
    return ExpertGallery(
        expert=expert,
        share=float(_count_experts(layer)[expert] / max(_count_experts(layer).sum(), 1e-300)),
        tokens=tuple(int(assignments.token_N[index]) for index in picked),
        gates=tuple(float(layer.gate_N[index]) for index in picked),
        labels=labels,
    )


def pick_tokens(mine_N: Ints, layer: RoutedLayer, sequence_T: Ints) -> list[int]:
    """Return the assignments with the highest gates, at most one in a sequence."""
    picked: list[int] = []
    used: set[int] = set()
    for index in mine_N[np.argsort(-layer.gate_N[mine_N], kind="stable")].tolist():
        sequence = int(sequence_T[layer.assignments.token_N[index]])
        if sequence not in used:
            used.add(sequence)
            picked.append(index)
        if len(picked) == NUM_SNIPPETS:
            break
    return picked


def _build_table(experts: Sequence[ExpertGallery], kinds: Sequence[str], layer: str) -> Table:
    def format_labels(pairs: Sequence[tuple[str, float]]) -> str:
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in pairs)

    return Table(
        title=f"What the experts of layer {layer} take",
        columns=(
            Column(header="expert"),
            Column(header="share"),
            *(Column(header=kind, align="left", wraps=True) for kind in kinds),
        ),
        rows=tuple(
            (
                str(expert.expert),
                f"{100 * expert.share:.1f} %",
                *(format_labels(expert.labels[kind]) for kind in kinds),
            )
            for expert in experts
        ),
    )
