"""Which part of a choice a router makes, where experts stand in groups and several routers choose for one token."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Level:
    """The place of a router among those of a layout of groups; the default: it stands alone.

    Learned routers differ by their parameters. A router that is a fixed function of the token must be told, or all of
    them would be the same function: on two levels the expert within a group would be the number of the group.
    """

    num_above: int = 1
    """Groups among which a router above has chosen already (layout `hierarchical`)."""
    num_below: int = 1
    """Experts in each of the groups that this router chooses among; 1: it chooses experts."""
    group: int = 0
    """Which of the groups side by side that all serve every token (layout `prototypes`)."""

    def total(self, num_experts: int) -> int:
        """Return how many experts the routers above, this one and those below choose among, of its `num_experts`."""
        return self.num_above * num_experts * self.num_below

    def part_of(self, number: Tensor, num_experts: int) -> Tensor:
        """Return the router's part (int64, 0 ... num_experts - 1) of the number of an expert among all `total`."""
        return number // self.num_below % num_experts

    def expert_of(self, number: Tensor, num_experts: int) -> Tensor:
        """Return the expert (int64, 0 ... num_experts - 1) for a non-negative whole number: a place, a label, an id.

        Alone it is the number modulo E. On two levels it is a part of the number modulo the experts of all groups: both
        parts together name one of these, so two levels of a fixed function are the same as one. In groups side by side
        each run of E numbers is moved on, in every group by other amounts, so that numbers that share an expert in one
        group are told apart in the others; the loads stay those of the plain modulo where E divides their range.
        """
        shift, rest, digits = number * 0, number // num_experts, self.group
        while digits and num_experts > 1:
            shift = shift + digits % num_experts * rest
            digits, rest = digits // num_experts, rest // num_experts
        return self.part_of((number + shift) % self.total(num_experts), num_experts)


SINGLE_LEVEL = Level()
"""The level of a router that stands alone."""
