"""What a model's MoE layers executed: FLOPs, rows and drops, summed over batches without synchronizing the device."""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.models.cost import executed_flops_per_token
from moebench.parallel.mesh import Mesh
from moebench.routing.contract import RouterContractError, label_router
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Task
from moebench.training.model import Model, compute_model_cost


class Column(IntEnum):
    """Columns of the sums."""

    EXCESS_FLOPS = 0
    """Forward FLOPs of router and experts, minus those planned."""
    POSITIONS = 1
    ROWS = 2
    """Rows that experts computed."""
    ASSIGNMENTS = 3
    """Assignments before capacity."""
    UNSERVED = 4
    """Positions that no expert computed."""
    MISCOUNTED = 5
    """Positions whose number of experts is not `experts_per_token`."""


class ExecutedCost:
    """Sums over batches for each MoE layer, fp64 [layers, columns].

    `total_LX` holds the sums of all processes up to the last `all_reduce`; later batches are local until the next one.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = layers
        self.total_LX = torch.zeros(len(layers), len(Column), dtype=torch.float64)
        self._pending_LX: Tensor | None = None

    def add(self, records: Sequence[LayerRecord]) -> None:
        """Add one forward pass, with a record of each layer in the order of the layers."""
        if not self.layers:
            return
        sums_LX = torch.stack([_sums(layer, record) for layer, record in zip(self.layers, records, strict=True)])
        self._pending_LX = sums_LX if self._pending_LX is None else self._pending_LX + sums_LX

    def all_reduce(self, mesh: Mesh) -> None:
        """Add the pending sums of all processes to the totals; every process calls it, even without batches."""
        if self.layers:
            self.total_LX = self.total_LX + self.take_pending(mesh).cpu()

    def take_pending(self, mesh: Mesh) -> Tensor:
        """Return the pending sums of all processes, on their device; they are no part of the totals."""
        zeros_LX = torch.zeros(self.total_LX.shape, dtype=torch.float64, device=mesh.device)
        pending_LX, self._pending_LX = self._pending_LX, None
        return mesh.world.sum(zeros_LX if pending_LX is None else pending_LX)

    def metrics(self, model: Model, task: Task) -> dict[str, float]:
        """Return the cost per token; empty without MoE layers or positions. Call `all_reduce` first.

        `load/flops_per_token`: forward FLOPs of one pass through the whole model. `load/experts_per_token`: rows that
        experts computed, mean over layers.
        """
        positions_L = self.total_LX[:, Column.POSITIONS]
        if not self.layers or not bool(positions_L.all()):
            return {}
        mean_LX = self.total_LX / positions_L.unsqueeze(1)
        excess_flops = {layer.name: float(mean_LX[n, Column.EXCESS_FLOPS]) for n, layer in enumerate(self.layers)}
        lengths = task.sequence_length, task.decoder_length
        planned = compute_model_cost(model, *lengths).flops_per_token
        return {
            "load/flops_per_token": executed_flops_per_token(model.backbone, planned, excess_flops, *lengths),
            "load/experts_per_token": float(mean_LX[:, Column.ROWS].mean()),
        }

    def drop_rates(self) -> dict[str, float]:
        """Return the share of assignments that were dropped and of positions left unserved, mean over layers."""
        if not self.layers:
            return {}
        assignments_L, rows_L = self.total_LX[:, Column.ASSIGNMENTS], self.total_LX[:, Column.ROWS]
        unserved_L = self.total_LX[:, Column.UNSERVED] / self.total_LX[:, Column.POSITIONS].clamp(min=1)
        is_soft = any(layer.router.form.is_mixture for layer in self.layers)
        dropped_L = torch.zeros_like(rows_L) if is_soft else 1 - rows_L / assignments_L.clamp(min=1)
        return {"drop_rate": float(dropped_L.mean()), "unserved": float(unserved_L.mean())}

    def check_experts_per_token(self) -> None:
        """Raise RouterContractError if a router without `has_variable_k` gave a token another number of experts.

        Widths are solved for `experts_per_token`: with a wrong value the arm's cost differs from its plan.
        """
        for layer, sums_X in zip(self.layers, self.total_LX, strict=True):
            if (
                layer.router.form.is_mixture
                or layer.router.traits.has_variable_k
                or not bool(sums_X[Column.MISCOUNTED])
            ):
                continue
            mean = float(sums_X[Column.ASSIGNMENTS] / sums_X[Column.POSITIONS])
            raise RouterContractError(
                f"{label_router(layer.router.config.name)} uses {mean:.4g} experts per token on average in layer"
                f" {layer.name}, but experts_per_token declares {layer.experts_per_token} for each (correct it, or set"
                " Facts.variable_k=True)"
            )

    def to_list(self) -> list[list[float]]:
        """Return the totals as plain numbers, for a checkpoint."""
        rows: list[list[float]] = self.total_LX.tolist()
        return rows

    def load_list(self, rows: list[list[float]]) -> None:
        """Restore the totals from `to_list`."""
        self.total_LX = torch.tensor(rows, dtype=torch.float64).view_as(self.total_LX)


def _sums(layer: MoELayer, record: LayerRecord) -> Tensor:
    """Return one row of the sums, in the order of `Column`."""
    kept, routing = record.kept, record.routing
    kept_T = kept.experts_per_token_T
    chosen_T = kept_T if kept is routing else routing.experts_per_token_T
    unserved_T, miscounted_T = kept_T == 0, chosen_T != layer.experts_per_token
    if record.valid_T is not None:
        unserved_T, miscounted_T = unserved_T & record.valid_T, miscounted_T & record.valid_T
    positions, planned = record.num_positions, layer.routed_flops_per_token(record.sequence_length or 0)
    columns = (
        layer.executed_flops(record) - planned * positions,
        positions,
        kept.rows_E.sum(),
        routing.load_E.sum(),
        unserved_T.sum(),
        miscounted_T.sum(),
    )
    return torch.stack([column.detach().double() for column in columns])
