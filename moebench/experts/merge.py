"""Merging: the experts' parameters are summed into one network for each segment of tokens (arXiv:2306.03745)."""

from collections.abc import Callable

from torch import Tensor

from moebench.experts.bank import Bank
from moebench.experts.dropout import Dropout
from moebench.routing.mixing import MergeRouting


def merged_mixture(
    bank: Bank,
    x_TD: Tensor,
    routing: MergeRouting,
    dropout: Dropout | None = None,
    while_in_flight: Callable[[], None] | None = None,
) -> Tensor:
    """Return y_TD: each segment's tokens through the network that the experts merge into for it.

    `while_in_flight`: see `Exchange`; nothing is on its way here, so it is called at the end.
    """
    y_GSD = bank.merged(routing.segments(x_TD), routing.weight_GE, dropout)
    if while_in_flight is not None:
        while_in_flight()
    return routing.tokens(y_GSD)
