"""Rows grouped by expert: the input of every kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """How many rows each expert has, and how they are laid out.

    Packed: the experts' rows are contiguous. Padded: every expert has `capacity` rows; results of padding rows are
    not used.
    """

    load_E: Tensor
    offset_E: Tensor
    """int32: end of each expert's rows when packed."""
    loads: tuple[int, ...] | None
    """The loads on the host; None on a GPU, where reading them would synchronize."""
    capacity: int | None
    """Rows of every expert when padded; None when packed."""

    @property
    def num_rows(self) -> int | None:
        """Rows, padding included; None where only the device knows."""
        if self.loads is None:
            return None
        return sum(self.loads) if self.capacity is None else self.capacity * len(self.loads)

    def split(self, x_RI: Tensor) -> Sequence[Tensor]:
        """Return the packed rows of each expert; rows after the last expert's belong to none."""
        loads = list(self.loads or self.load_E.tolist())
        return torch.split(x_RI, [*loads, x_RI.shape[0] - sum(loads)])[:-1]
