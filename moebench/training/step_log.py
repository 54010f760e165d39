"""What a step's log says beyond its losses: load over all processes, and what the processes cost each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moebench.experts.layer import MoELayer
from moebench.parallel.mesh import Mesh
from moebench.parallel.traffic import peak_memory_gib, predicted_bytes
from moebench.routing.metrics import LoadCount, summarise_load
from moebench.routing.values import LayerRecord
from moebench.training.executed_cost import ExecutedCost
from moebench.training.module import CellModule

MIB = 2**20


@dataclass
class ParallelCosts:
    """What the timed steps of a run cost, so that the result can say it in a line."""

    sums: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a timed step; the first steps allocate and are left out."""
        if step > 1 and metrics:
            self.num_steps += 1
            for name, value in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the mean over steps of each metric."""
        return {name: total / self.num_steps for name, total in self.sums.items()}


def load_metrics(module: CellModule) -> dict[str, float]:
    """Return the load and the executed cost of a step's micro-batches, of all processes; empty for a dense model.

    Raises RouterContractError if a router uses another number of experts per token than it declares.
    """
    if not module.records:
        return {}
    mesh, execution = module.mesh, ExecutedCost(module.layers)
    layers = [[LoadCount.from_record(record) for record in layer] for layer in zip(*module.records, strict=True)]
    for records in module.records:
        execution.add(records)
    execution.share(mesh)
    execution.check_declared()
    load = summarise_load([sum(counts[1:], counts[0]).sum_over(mesh.world) for counts in layers])
    return load | execution.metrics(module.model, module.task)


def parallel_metrics(
    layers: Sequence[MoELayer],
    records: Sequence[Sequence[LayerRecord]],
    mesh: Mesh,
    *,
    step_s: float,
    num_tokens: int,
    element_size: int,
) -> dict[str, float]:
    """Return what a timed step of many processes cost; seconds and shares are means, memory the largest, over them."""
    if not mesh.process_info.has_group:
        return {}
    traffic = mesh.traffic
    predicted = sum(predicted_bytes(layers, micro, element_size) for micro in records)
    own = [step_s, traffic.transfer_s, traffic.wait_s, traffic.num_bytes, predicted, peak_memory_gib(mesh.device)]
    own_1N = torch.tensor([[*own, _rows(layers, records, mesh)]], dtype=torch.float64, device=mesh.device)
    of_ranks = mesh.world.gather(own_1N).cpu()
    step, transfer, wait, sent, expected, memory, rows = of_ranks.T
    slowest = float(step.max())
    metrics = {
        "parallel/processes": float(mesh.size),
        "parallel/step_s_max": slowest,
        "parallel/all_to_all_s": float(transfer.mean()),
        "parallel/all_to_all_share": float((transfer / step).mean()),
        "parallel/wait_s": float(wait.mean()),
        "parallel/wait_share": float((wait / step).mean()),
        "parallel/sent_mib": float(sent.mean()) / MIB,
        "parallel/predicted_mib": float(expected.mean()) / MIB,
        "parallel/tokens_per_s_per_device": num_tokens / slowest / mesh.size,
        "parallel/peak_memory_gib": float(memory.max()),
        "parallel/rank_load_max": float(rows.max() / rows.mean().clamp(min=1)),
    }
    per_rank = {f"parallel/rows/rank_{rank}": float(n) for rank, n in enumerate(rows.tolist())}
    return metrics | per_rank | {f"parallel/memory_gib/rank_{rank}": float(n) for rank, n in enumerate(memory.tolist())}


def _rows(layers: Sequence[MoELayer], records: Sequence[Sequence[LayerRecord]], mesh: Mesh) -> int:
    """Return the rows that this process's experts computed in a step, of all processes' tokens."""
    total = 0
    for layer, of_layer in zip(layers, zip(*records, strict=True), strict=True):
        own_E = torch.stack([record.kept.load_E for record in of_layer]).sum(0)
        everyones_RE = mesh.world.gather(own_E.unsqueeze(0))
        row = mesh.rank // mesh.config.expert
        row_E = everyones_RE.view(mesh.config.data, mesh.config.expert, -1)[row].sum(0)
        total += layer.bank.count_computed_rows(own_E, row_E)
    return total
