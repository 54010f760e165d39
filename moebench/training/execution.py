"""What a model's MoE layers executed: FLOPs, rows and drops, summed over batches without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.models.cost import executed_flops_per_token
from moebench.parallel.mesh import Mesh
from moebench.routing.contract import RouterContractError, label_router
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Task
from moebench.training.model import Model, model_cost

EXCESS, POSITIONS, ROWS, CHOSEN, UNSERVED, MISCOUNTED = range(6)
"""Columns of the sums: forward FLOPs of router and experts minus those planned, positions, rows of the experts,
assignments before capacity, positions that no expert computed, and those with another number of experts than
`experts_per_token`."""
NUM_COLUMNS = 6


class ExecutedCost:
    """Sums over batches for each MoE layer, fp64 [layers, columns].

    `total_LX` holds those of all processes up to the last `share`; later batches are local until the next call.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = layers
        self.total_LX = torch.zeros(len(layers), NUM_COLUMNS, dtype=torch.float64)
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
        excess = {layer.name: float(per_position_LX[n, EXCESS]) for n, layer in enumerate(self.layers)}
        lengths = task.sequence_length, task.decoder_length
        planned = model_cost(model, *lengths).flops_per_token
        return {
            "load/flops_per_token": executed_flops_per_token(model.backbone, planned, excess, *lengths),
            "load/experts_per_token": float(per_position_LX[:, ROWS].mean()),
        }

    def losses(self) -> dict[str, float]:
        """Return the share of assignments that no expert computed and of positions that none did, means over layers."""
        chosen_L, rows_L = self.total_LX[:, CHOSEN], self.total_LX[:, ROWS]
        unserved_L = self.total_LX[:, UNSERVED] / self.total_LX[:, POSITIONS].clamp(min=1)
        soft = any(layer.router.form.is_mixture for layer in self.layers)
        dropped_L = torch.zeros_like(rows_L) if soft else 1 - rows_L / chosen_L.clamp(min=1)
        return {"drop_rate": float(dropped_L.mean()), "unserved": float(unserved_L.mean())} if self.layers else {}

    def check_declared(self) -> None:
        """Raise RouterContractError if a router without variable k sent a token to another number of experts.

        Widths are solved by `experts_per_token`: a wrong value makes the arm's cost differ from its plan.
        """
        for layer, sums_X in zip(self.layers, self.total_LX, strict=True):
            if layer.router.form.is_mixture or layer.router.traits.has_variable_k or not bool(sums_X[MISCOUNTED]):
                continue
            measured = float(sums_X[CHOSEN] / sums_X[POSITIONS])
            raise RouterContractError(
                f"{label_router(layer.router.config.name)} uses {measured:.4g} experts per token on average in layer"
                f" {layer.name}, but experts_per_token says {layer.experts_per_token} for each (correct it, or set"
                " Facts.variable_k=True)"
            )

    def state(self) -> list[list[float]]:
        """Return the sums of all processes, for a checkpoint."""
        rows: list[list[float]] = self.total_LX.tolist()
        return rows

    def load_state(self, state: list[list[float]]) -> None:
        """Go on from the sums of a checkpoint."""
        self.total_LX = torch.tensor(state, dtype=torch.float64).view_as(self.total_LX)


def _sums(layer: MoELayer, record: LayerRecord) -> Tensor:
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
