"""Metrics of one logged step: expert load over all processes, and what communication between them cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moebench.experts.layer import MoELayer
from moebench.parallel.mesh import Mesh
from moebench.parallel.sharded_optimizer import count_state_bytes
from moebench.parallel.traffic import peak_memory_gib, predict_bytes
from moebench.routing.metrics import LoadCount, sum_counts, summarise_load
from moebench.routing.values import LayerRecord
from moebench.runs.layer_series import LayerValues
from moebench.training.executed_cost import ExecutedCost
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer
from moebench.training.telemetry.layer_values import build_layer_values, summarise_logits

MIB = 2**20


@dataclass
class ParallelCosts:
    """Sums of the parallel metrics over the logged steps of a run."""

    sums: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of a step; the first step is left out because it allocates."""
        if step > 1 and metrics:
            self.num_steps += 1
            for name, value in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over steps."""
        return {name: total / self.num_steps for name, total in self.sums.items()}


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """Expert load and executed cost of a step over all processes; empty for a dense model."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over layers."""
    layers: Mapping[str, LayerValues] = field(default_factory=dict)


def measure_load(module: CellModule) -> StepLoad:
    """Measure load, drops and executed cost of the current step, and the logits where layers are watched.

    Raises RouterContractError if a router uses another number of experts per token than it declares.
    """
    if not module.records:
        return StepLoad()
    mesh, executed_cost = module.mesh, ExecutedCost(module.layers)
    records = list(zip(*module.records, strict=True))  # by layer
    layers = [[LoadCount.from_record(record) for record in layer_records] for layer_records in records]
    for pass_records in module.records:
        executed_cost.add(pass_records)
    executed_cost.all_reduce(mesh)
    executed_cost.check_experts_per_token()
    counts = sum_counts([sum(counts[1:], counts[0]) for counts in layers], mesh.world)
    metrics = summarise_load(counts) | executed_cost.metrics(module.model, module.task)
    if not module.has_telemetry or not records:
        return StepLoad(metrics=metrics)
    logits = summarise_logits(module.layers, records, mesh.world)
    length = records[0][0].sequence_length or 0
    return StepLoad(metrics=metrics, layers=build_layer_values(counts, executed_cost, logits, length))


def compute_parallel_metrics(module: CellModule, timer: StepTimer) -> dict[str, float]:
    """Compute what communication cost in the current step, which must be timed; empty without a process group.

    Seconds and shares are means over processes, memory is the maximum.
    """
    mesh = module.mesh
    if not mesh.process_info.has_group:
        return {}
    traffic, step_s, num_tokens = mesh.traffic, timer.durations_s[-1], timer.num_tokens[-1]
    element_size = 2 if module.config.train.precision == "bf16" else 4
    predicted = sum(predict_bytes(module.layers, records, element_size) for records in module.records)
    values = [step_s, traffic.transfer_s, traffic.wait_s, traffic.num_bytes, predicted, peak_memory_gib(mesh.device)]
    values += [traffic.num_collectives, traffic.collective_bytes, _count_state_bytes(module)]
    values.append(_count_rows(module.layers, module.records, mesh))
    values_1N = torch.tensor([values], dtype=torch.float64, device=mesh.device)
    columns = mesh.world.gather(values_1N, lengths=(1,) * mesh.size).cpu().T
    step_W, transfer_W, wait_W, sent_W, predicted_W, memory_W, collectives_W, summed_W, state_W, rows_W = columns
    slowest_s = float(step_W.max())
    metrics = {
        "parallel/processes": float(mesh.size),
        "parallel/step_s_max": slowest_s,
        "parallel/all_to_all_s": float(transfer_W.mean()),
        "parallel/all_to_all_share": float((transfer_W / step_W).mean()),
        "parallel/wait_s": float(wait_W.mean()),
        "parallel/wait_share": float((wait_W / step_W).mean()),
        "parallel/sent_mib": float(sent_W.mean()) / MIB,
        "parallel/predicted_mib": float(predicted_W.mean()) / MIB,
        "parallel/collectives": float(collectives_W.mean()),
        "parallel/collective_mib": float(summed_W.mean()) / MIB,
        "parallel/optimizer_mib": float(state_W.max()) / MIB,
        "parallel/tokens_per_s_per_device": num_tokens / slowest_s / mesh.size,
        "parallel/peak_memory_gib": float(memory_W.max()),
        "parallel/rank_load_max": float(rows_W.max() / rows_W.mean().clamp(min=1)),
    }
    metrics |= {f"parallel/rows/rank_{rank}": float(n) for rank, n in enumerate(rows_W.tolist())}
    return metrics | {f"parallel/memory_gib/rank_{rank}": float(n) for rank, n in enumerate(memory_W.tolist())}


def _count_state_bytes(module: CellModule) -> int:
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    return count_state_bytes(optimizer)


def _count_rows(layers: Sequence[MoELayer], records: Sequence[Sequence[LayerRecord]], mesh: Mesh) -> int:
    """Count the rows that this process's experts computed in a step, for the tokens of all processes."""
    by_layer = list(zip(*records, strict=True))
    if not by_layer:
        return 0
    loads = [torch.stack([record.kept.load_E for record in layer_records]).sum(0) for layer_records in by_layer]
    load_WX = mesh.world.gather(torch.cat(loads).unsqueeze(0), lengths=(1,) * mesh.size)  # of all layers
    row = mesh.rank // mesh.config.expert
    row_load_X = load_WX.view(mesh.config.data, mesh.config.expert, -1)[row].sum(0)
    row_loads = torch.split(row_load_X, [len(load_E) for load_E in loads])
    parts = zip(layers, loads, row_loads, strict=True)
    return sum(layer.bank.count_computed_rows(load_E, row_load_E) for layer, load_E, row_load_E in parts)
