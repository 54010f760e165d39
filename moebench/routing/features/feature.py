"""The interface through which shared code supplies a context feature: an input that only some routers need."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from moebench.routing.values import LayerRecord

ValueT = TypeVar("ValueT")


class TaskFactsView(Protocol):
    """The facts of a task that decide whether it has a feature; known before any data is read."""

    @property
    def labels(self) -> str:
        """Description of the label of a token; empty where there are none."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has two backbones."""


class TaskView(Protocol):
    """The part of a prepared task that features read."""

    token_count_V: Tensor | None

    def token_pairs(self) -> Tensor:
        """Return how often each token id is followed by each, int64 [V, V]."""


class BatchView(Protocol):
    """The part of a batch that features read."""

    @property
    def label_BL(self) -> Tensor | None:
        """int64 label of each token."""

    @property
    def valid_BL(self) -> Tensor | None:
        """bool, False at padding; None: nothing is padded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPasses:
    """One micro-batch after its forward passes, as the loss of a feature reads it."""

    outputs: Sequence[Any]
    """Output of the model in each pass, as its task reads it."""
    input_vectors: Callable[[], Tensor]
    """Compute the vectors x_BLD that enter the first block."""
    task_loss: Callable[[Any], Tensor]
    """Output -> the task's loss, mean over the step's predictions, scalar."""
    log_probabilities: Callable[[Any], Tensor]
    """Output -> fp32 log-probabilities, classes last."""
    mean: Callable[[Tensor], Tensor]
    """A number for each prediction or token, first dimension B -> mean over the step's predictions, scalar."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureLoss:
    """An auxiliary loss that a feature adds in training."""

    name: str
    """Logged as balance/NAME, and as loss/NAME times the coefficient."""
    raw: Tensor
    coefficient: float


class Feature:
    """An input that a router needs besides token vectors, ids and domains.

    A router lists its features in `Router.required_features`. Code that builds, runs or trains a model calls them
    through this interface only; the defaults supply and cost nothing. The value of a feature is
    in `RouterBuildContext.features` or `RouteContext.features` under its class. Subclasses are frozen dataclasses whose
    fields are set from a router's configuration.
    """

    description: ClassVar[str] = "a feature"
    """What is missing where a task does not have it: "router X needs ..."."""
    module_name: ClassVar[str] = ""
    """Attribute of the model that holds what `build_module` returns."""
    num_passes: ClassVar[int] = 1
    """Forward passes over each training batch."""

    @property
    def sequence_group_size(self) -> int:
        """Consecutive sequences that are computed together: every process holds a multiple of it."""
        return 1

    def is_provided_by(self, facts: TaskFactsView) -> bool:
        """Return whether a task has what the feature needs."""
        return True

    def from_task(self, task: TaskView) -> Any | None:
        """Return the build-time value that the task's data gives; None: nothing."""
        return None

    def from_bank(self, has_network_E: Sequence[bool]) -> Any | None:
        """Return the build-time value that a bank of experts gives; None: nothing.

        `has_network_E`: whether each expert has a network (not the zero, copy and constant experts).
        """
        return None

    def build_module(self, d_model: int, build_head: Callable[[int], nn.Module]) -> nn.Module | None:
        """Return a module that all routers share; None: none. `build_head`: width -> a head of the task."""
        return None

    def from_batch(self, batch: BatchView, x_BLD: Tensor, module: nn.Module | None) -> Tensor | None:
        """Return the value of each token of a batch, [B, L, ...]; None: nothing.

        `x_BLD`: the vectors that enter the first block. `module`: what `build_module` returned. Values are gathered
        over processes where a router needs the whole batch.
        """
        return None

    def from_layer(self, record: LayerRecord) -> Tensor | None:
        """Return the value of each token, [T, ...], for the layers above an MoE layer; None: it stays as it is."""
        return None

    def compute_loss(self, passes: TrainingPasses, module: nn.Module | None) -> FeatureLoss | None:
        """Return the loss that the feature adds in training; None: none."""
        return None

    def count_training_flops(self, module: nn.Module | None, count: Callable[[nn.Module], int]) -> int:
        """Return forward FLOPs per token of what training alone computes. `count`: module -> its FLOPs per token."""
        return 0


def collect(features: Iterable[Feature], read: Callable[[Feature], ValueT | None]) -> dict[type[Feature], ValueT]:
    """Return what `read` gives for each feature, by its class; features for which it gives None are left out."""
    values = ((type(feature), read(feature)) for feature in features)
    return {key: value for key, value in values if value is not None}


def count_passes(features: Iterable[Feature]) -> int:
    """Return how many forward passes training makes over each batch."""
    return max((feature.num_passes for feature in features), default=1)


def sequence_group_size(features: Iterable[Feature]) -> int:
    """Return the number of consecutive sequences that must be on the same process."""
    return max((feature.sequence_group_size for feature in features), default=1)
