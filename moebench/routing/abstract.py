"""The interfaces between a routing, the layer and the experts that compute the routing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import Tensor

if TYPE_CHECKING:
    from moebench.routing.values import Routing


class ExpertPass(Protocol):
    """The experts of a layer in one forward pass over a batch of tokens; `experts` has the implementation."""

    @property
    def x_TD(self) -> Tensor:
        """The vectors that the experts read."""

    @property
    def added(self) -> Sequence[Tensor]:
        """Return the change of the state of every token by each step of a chain of experts, [T, D] each."""

    def mix(self, routing: "Routing") -> Tensor:
        """Return y_TD: for each token the weighted sum of its experts' outputs; 0 for an unserved token."""

    def compute_rows(self, x_RD: Tensor, load_E: Tensor) -> Tensor:
        """Return y_RD for rows sorted by expert."""

    def compute_merged(self, x_GSD: Tensor, weight_GE: Tensor) -> Tensor:
        """Return y_GSD: the rows of each segment through one network with the parameters Σ_e w_ge θ_e."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractRouting(ABC):
    """The output of a router, which defines how experts compute it."""

    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the router's own losses need of each token, by name: the first dimension is T."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Values for these losses that belong to the batch as a whole, by name."""
    computes_padding: ClassVar[bool]
    """Whether experts compute rows for padding."""

    @abstractmethod
    def compute(self, experts: ExpertPass) -> Tensor:
        """Return y_TD, the output of the experts for every token."""

    @abstractmethod
    def tabulate_labels(self, label_T: Tensor, num_labels: int) -> Tensor:
        """Return how much tokens of each label use each expert, fp64 [labels, E]; tables of batches add up."""

    def without_padding(self, valid_T: Tensor) -> Self:
        """Return the routing in which padding (False in `valid_T`) takes no slot and counts nowhere."""
        return self

    def with_capacity(self, limit: Callable[["Routing"], "Routing"]) -> "Self | Routing":
        """Return the routing after capacity; `limit` applies it to a list of assignments."""
        return self

    @property
    def num_rerouted(self) -> int:
        """Assignments that another expert computes than the router chose."""
        return 0
