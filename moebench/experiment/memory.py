"""Estimate the peak memory of a cell before it starts, and refuse one that cannot fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moebench.cores import available_memory
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.launch.devices import uses_gpu
from moebench.reporting.formatting import format_bytes
from moebench.runs.cell import Cell
from moebench.schema import CellConfig

PROGRAM_BYTES = 560 * 2**20
"""Python, torch and the other libraries in one process, and the tokens of an evaluation."""
COMPILED_BYTES = 900 * 2**20
"""oneDNN's cache of products in bf16 on a CPU, one entry for each number of rows of an expert: it is full soon."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA's context and the workspaces of its libraries on a GPU."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of a cell: parameters, gradients, AdamW's moments, activations, and the program."""

    process_bytes: int
    """Bytes of one process."""
    num_processes: int
    """Processes that share the memory of one machine: 1 for each GPU."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all processes that share a memory."""
        return self.process_bytes * self.num_processes


def estimate_memory(config: CellConfig, costs: ModelCosts) -> MemoryEstimate:
    """Return the peak memory of a cell: of one machine, or of one GPU where it trains on GPUs."""
    training = costs.training_bytes(config)
    if uses_gpu(config.train):
        return MemoryEstimate(process_bytes=CONTEXT_BYTES + training, num_processes=1)
    per_node = config.parallel.world_size // config.parallel.nodes
    program = PROGRAM_BYTES
    if config.train.precision == "bf16" and costs.facts(config).size.expert_params:
        program += COMPILED_BYTES
    return MemoryEstimate(process_bytes=program + training, num_processes=per_node)


def find_memory(config: CellConfig) -> tuple[int, str]:
    """Return the memory that a cell can have at most, in bytes, and what has it."""
    if uses_gpu(config.train):
        return torch.cuda.get_device_properties(0).total_memory, "a GPU"
    return available_memory(), "this machine"


def require_memory(cells: Sequence[Cell], costs: ModelCosts) -> None:
    """Raise UsageError for a cell whose estimated peak exceeds the memory of the machine or the GPU."""
    for cell in {cell.arm: cell for cell in cells}.values():
        estimate = estimate_memory(cell.config, costs)
        available, owner = find_memory(cell.config)
        if estimate.total_bytes > available:
            processes = f" in {estimate.num_processes} processes" if estimate.num_processes > 1 else ""
            raise UsageError(
                f"{cell.arm}: needs about {format_bytes(estimate.total_bytes)}{processes}, and {owner} has"
                f" {format_bytes(available)}"
                " (allowed: a smaller model, train.accumulate for smaller micro-batches, fewer processes, or"
                " --ignore-memory)"
            )


def count_fitting_cells(cells: Sequence[Cell], costs: ModelCosts) -> int:
    """Return how many of the cells fit into memory at a time, at least 1; on GPUs each cell has its own."""
    on_cpu = [cell.config for cell in {cell.arm: cell for cell in cells}.values() if not uses_gpu(cell.config.train)]
    largest = max((estimate_memory(config, costs).total_bytes for config in on_cpu), default=0)
    return max(1, available_memory() // largest) if largest else len(cells)
