"""What a model's MoE layers executed: FLOPs, rows and drops, summed over batches without waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.models.cost import executed_flops_per_token
from moebench.parallel.mesh import Mesh
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Task
from moebench.training.model import Model, model_cost

FLOPS, POSITIONS, ROWS, CHOSEN, UNSERVED = range(5)
"""Columns of the sums: forward FLOPs of router and experts, positions, rows of the experts, assignments before
capacity, positions that no expert computed."""


class RouterContractError(UsageError):
    """A router does not do what it declares; one line that names it."""


class Execution:
    """Sums over batches for each MoE layer, fp64 [layers, 5]: of this process since `share`, and of all before it."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = layers
        self.total_LX = torch.zeros(len(layers), 5, dtype=torch.float64)
        """Of all processes, up to the last call of `share`."""
        self._pending_LX: Tensor | None = None

    def add(self, records: Sequence[LayerRecord]) -> None:
        """Count one forward pass: a record for each of the layers, in their order."""
        if not self.layers:
            return
        sums_LX = torch.stack([_sums(layer, record) for layer, record in zip(self.layers, records, strict=True)])
        self._pending_LX = sums_LX if self._pending_LX is None else self._pending_LX + sums_LX

    def share(self, mesh: Mesh) -> None:
        """Add up over all processes; each of them calls it, those that counted nothing too."""
        if not self.layers:
            return
        zeros_LX = torch.zeros(self.total_LX.shape, dtype=torch.float64, device=mesh.device)
        pending_LX = zeros_LX if self._pending_LX is None else self._pending_LX
        self.total_LX = self.total_LX + mesh.world.sum(pending_LX).cpu()
        self._pending_LX = None

    def metrics(self, model: Model, task: Task) -> dict[str, float]:
        """Return what was executed per token, and what a capacity cost; empty without MoE layers or positions.

        `load/flops_per_token`: forward FLOPs of one pass of the whole model. `load/experts_per_token`: rows that the
        experts computed, mean over layers. Call `share` first.
        """
        positions_L = self.total_LX[:, POSITIONS]
        if not self.layers or not bool(positions_L.all()):
            return {}
        per_position_LX = self.total_LX / positions_L.unsqueeze(1)
        flops = {layer.layer: float(per_position_LX[n, FLOPS]) for n, layer in enumerate(self.layers)}
        lengths = task.sequence_length, task.decoder_length
        planned = model_cost(model, *lengths).flops_per_token
        return {
            "load/flops_per_token": executed_flops_per_token(model.backbone, planned, flops, *lengths),
            "load/experts_per_token": float(per_position_LX[:, ROWS].mean()),
        }

    def losses(self) -> dict[str, float]:
        """Return the share of assignments that no expert computed and of positions that none did, means over layers."""
        chosen_L, rows_L = self.total_LX[:, CHOSEN], self.total_LX[:, ROWS]
        unserved_L = self.total_LX[:, UNSERVED] / self.total_LX[:, POSITIONS].clamp(min=1)
        soft = any(layer.router.is_soft for layer in self.layers)
        dropped_L = torch.zeros_like(rows_L) if soft else 1 - rows_L / chosen_L.clamp(min=1)
        return {"drop_rate": float(dropped_L.mean()), "unserved": float(unserved_L.mean())} if self.layers else {}

    def check_declared(self) -> None:
        """Raise RouterContractError if a router sent tokens to another number of experts than it declares.

        Arms are matched and widths are solved by that number, so nothing that follows would be a fair comparison.
        """
        for layer, sums_X in zip(self.layers, self.total_LX, strict=True):
            name = layer.router.config.name
            if layer.router.is_soft or ROUTERS.get(name).facts.variable_k:
                continue
            chosen, positions = float(sums_X[CHOSEN]), float(sums_X[POSITIONS])
            if chosen != layer.experts_per_token * positions:
                raise RouterContractError(
                    f"router '{name}' declares {layer.experts_per_token} experts per token (experts_per_token) and sent"
                    f" each token to {chosen / positions:.4g} in layer {layer.layer}: correct experts_per_token, or"
                    " set Facts.variable_k=True"
                )

    def state(self) -> list[list[float]]:
        """Return the sums of all processes, for a checkpoint."""
        rows: list[list[float]] = self.total_LX.tolist()
        return rows

    def load_state(self, state: list[list[float]]) -> None:
        """Go on from the sums of a checkpoint."""
        self.total_LX = torch.tensor(state, dtype=torch.float64).view_as(self.total_LX)


def _sums(layer: MoELayer, record: LayerRecord) -> Tensor:
    unserved_T: Any = record.kept.experts_per_token_T == 0
    unserved_T = unserved_T if record.valid_T is None else unserved_T & record.valid_T
    columns = (
        layer.executed_flops(record),
        record.num_positions,
        record.kept.rows_E.sum(),
        record.routing.load_E.sum(),
        unserved_T.sum(),
    )
    return torch.stack([column.detach().double() for column in columns])
