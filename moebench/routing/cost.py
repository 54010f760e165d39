"""What routing costs: rows that experts compute and FLOPs of the router itself, as planned and as executed."""

from torch import Tensor, nn

from moebench.routing.values import LayerRecord


class RouterCost(nn.Module):
    """Cost of a router that multiplies every token with all its matrices and whose experts compute tokens as rows."""

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return how many rows the experts compute for one token, on average: its experts, unless rows are not tokens.

        Merging E experts costs as much as E rows through one of them: 2 FLOPs per weight.
        """
        return experts_per_token

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of the router for one token: 2 per weight of each matrix."""
        return sum(2 * parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs of the router for the positions of a record, fp64 scalar: each is routed once."""
        return record.num_positions * self.flops_per_token()
