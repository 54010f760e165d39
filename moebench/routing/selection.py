"""Selections of a router: which of the experts that it lists for a token the token uses."""

from dataclasses import replace

import torch
from torch import Tensor

from moebench.routing.values import Routing


def select(routing: Routing, chosen_N: Tensor) -> Routing:
    """Return the routing with only the assignments where `chosen_N` (bool) is true; the others are no choices at all.

    The list keeps its length where it would be necessary to wait for a device in order to shorten it.
    """
    if can_read_without_waiting(chosen_N.device):
        return routing.keep(chosen_N).compact()
    return replace(routing.keep(chosen_N), chosen_N=chosen_N)


def can_read_without_waiting(device: torch.device) -> bool:
    """Return whether values of a tensor can be read at once."""
    return device.type == "cpu"
