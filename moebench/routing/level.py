"""Levels: the part of a choice that one of several routers makes, where experts are in groups."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Level:
    """Position of a router in a layout of groups; by default it is the only one.

    Learned routers differ in their parameters. Routers that are a fixed function of the token need the level, or all of
    them would be the same function: on two levels, the expert within a group would equal the number of the group.
    """

    num_above: int = 1
    """Groups among which a router above has chosen (layout `hierarchical`)."""
    num_below: int = 1
    """Experts in each of the groups that this router chooses among; 1: it chooses experts."""
    group: int = 0
    """Index among parallel groups that all serve every token (layout `prototypes`)."""

    def total(self, num_experts: int) -> int:
        """Return how many experts all levels choose among, where this one has `num_experts`."""
        return self.num_above * num_experts * self.num_below

    def select_part(self, number: Tensor, num_experts: int) -> Tensor:
        """Return this router's choice (int64, 0 ... num_experts - 1) for the index of one of all `total` experts."""
        return number // self.num_below % num_experts

    def select_expert(self, number: Tensor, num_experts: int) -> Tensor:
        """Return the expert (int64, 0 ... num_experts - 1) for a non-negative integer: a position, a label, an id.

        A single router takes the number modulo E. On two levels, the choices of both together are the number modulo the
        experts of all groups, so that two levels of a fixed function equal one. In parallel groups each run of E
        numbers is shifted, by another amount in each group, so that numbers that share an expert in one group are
        separated in others; loads are those of the plain modulo where E divides the range of numbers.
        """
        shift, rest, digits = number * 0, number // num_experts, self.group
        while digits and num_experts > 1:
            shift = shift + digits % num_experts * rest
            digits, rest = digits // num_experts, rest // num_experts
        return self.select_part((number + shift) % self.total(num_experts), num_experts)


SINGLE_LEVEL = Level()
"""The level of a single router."""
