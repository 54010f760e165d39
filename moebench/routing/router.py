"""The contract of a router: a module that assigns tokens to experts, with a typed Config and declared facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic

from torch import Tensor
from typing_extensions import TypeVar

from moebench.components import RouterConfig as RouterConfig
from moebench.errors import UsageError
from moebench.registry import Registry
from moebench.routing.budget import Knob
from moebench.routing.context import NO_DATA, DataSummary, RouteContext
from moebench.routing.cost import RouterCost
from moebench.routing.features.feature import Feature
from moebench.routing.level import SINGLE_LEVEL, Level
from moebench.routing.reduction import LossValue
from moebench.routing.values import AnyRouting, LayerRecord

ConfigT = TypeVar("ConfigT", bound=RouterConfig, default=Any)
"""The Config of a router: `class Mine(Router["Mine.Config"])`; left out, configs are not type-checked."""


@dataclass(frozen=True, kw_only=True)
class Causality:
    """What the routing of a token depends on besides the token: measured by the contract tests."""

    causal: bool
    """Dropless, the routing of a token depends on no later token."""
    reason: str
    batch_dependent: bool
    """In evaluation, the routing of a sequence depends on what else is in the batch."""
    with_capacity: bool | None = None
    """`causal` when a capacity drops by this router's priority; None: as `causal`."""
    in_evaluation: bool | None = None
    """`causal` in evaluation, for routers that balance over the batch in training alone; None: as `causal`."""
    draws_in_evaluation: bool = False
    """Draws random numbers in evaluation too: by the batch and the position of a token in it, which then matter in no
    other way."""
    reads_sequence: bool = False
    """The routing of a token depends on other tokens of its sequence, while it depends on no other sequence."""

    def is_causal(self, *, with_capacity: bool) -> bool:
        """Return whether no token's output depends on later tokens, with or without a capacity."""
        return self.causal and (not with_capacity or self.with_capacity in (None, True))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a routing algorithm; shown by `list` and `show`, enforced by the contract tests."""

    family: str
    """The survey's families: token choice, expert choice, global assignment, static, stochastic, ... or baseline."""
    equation: str
    paper: str
    """arXiv number or DOI, and the equation or section."""
    causality: Causality
    learned: bool = True
    """It has parameters, and the task loss reaches them through the weights, except those `trained_by_own_loss`."""
    trained_by_own_loss: tuple[str, ...] = ()
    """Parameters and modules that learn only from its own losses or its objective (rerouting by scores counts as a
    weight)."""
    makes_scores: bool = True
    """Scores every expert for every token, as some losses and rerouting over capacity require."""
    own_losses: tuple[str, ...] = ()
    """Names of the losses that `losses(record)` returns."""
    balanced: bool = False
    """In training every expert has the same load for any tokens, where the sizes divide: measured."""
    variable_k: bool = False
    """Tokens may use another number of experts than `experts_per_token`, in training or in evaluation: measured."""
    budget: Knob | None = None
    """What `layout.match=measured_flops` adjusts to reach a number of FLOPs per token; None: nothing does."""
    cost: str = "T·E"
    """Growth of the time to route T tokens to E experts, without the gate's product."""
    use: str = ""
    """When to choose it; required of built-in routers."""
    beware: str = ""
    """What can go wrong with it; required of built-in routers."""


class Form(Enum):
    """What a router's `forward` returns, which decides how experts are built and computed."""

    LIST = "list"
    """A `Routing`: a list of assignments."""
    SOFT = "soft"
    """A `SoftRouting`: slots that mix tokens."""
    MERGED = "merged"
    """A `MergeRouting`: mixes of the parameters of all experts, which must have one shape and be on every process."""
    CHAIN = "chain"
    """A `ChainRouting`: experts are consecutive steps, and none can be left out for lack of a slot."""
    DENSE = "dense"
    """A `Routing` to a single expert: the model holds plain feed-forward networks instead of banks."""

    @property
    def is_dense(self) -> bool:
        """Whether no expert is chosen because there is only one."""
        return self is Form.DENSE

    @property
    def is_mixture(self) -> bool:
        """Whether tokens or parameters are mixed: nothing is chosen, so capacity and overflow do not apply."""
        return self in (Form.SOFT, Form.MERGED)

    @property
    def is_merged(self) -> bool:
        """Whether the parameters of the experts are mixed."""
        return self is Form.MERGED

    @property
    def is_chain(self) -> bool:
        """Whether experts are consecutive steps."""
        return self is Form.CHAIN


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterBuildContext:
    """What a router is built from: the sizes around it and what is known of the data before training."""

    d_model: int
    num_experts: int
    layer: int = 0
    data: DataSummary = NO_DATA
    features: Mapping[type[Feature], Any] = field(default_factory=dict)
    """Build-time values of the features that the router requires."""
    width_ratio: float = 1.0
    """d_model over that of the base model with muP, whose gates start smaller by its square root."""
    level: Level = SINGLE_LEVEL
    """Part of the choice that the router makes in a layout of groups."""


@dataclass(frozen=True, kw_only=True)
class RouterTraits:
    """Properties of a router that depend on its options, for the layer and the checks."""

    needs_whole_batch: bool = False
    """A token's routing depends on other sequences of the batch: each process gathers all tokens, routes them and keeps
    its own part."""
    has_variable_k: bool = False
    """Tokens may use another number of experts than `experts_per_token`."""
    has_state: bool = False
    """Whether `after_step` updates state."""


class Router(RouterCost, Generic[ConfigT]):
    """Assigns tokens to experts; owns its gate and its state.

    Capacity, communication and experts are shared by all routers, so that two arms of a comparison differ only in the
    routing algorithm.
    """

    Config: ClassVar[type[RouterConfig]]
    form: Form = Form.LIST
    """What `forward` returns."""

    def __init__(self, config: ConfigT, context: RouterBuildContext) -> None:
        super().__init__()
        self.config = config
        self.num_experts = context.num_experts

    @classmethod
    def required_features(cls, config: ConfigT) -> tuple[Feature, ...]:
        """Return what the router needs besides token vectors, ids and domains (`routing/features`)."""
        return ()

    @classmethod
    def experts_per_token(cls, config: ConfigT, num_experts: int) -> int:
        """Return how many experts a token uses (on average): it sets the width of experts in matched arms."""
        return 1

    @classmethod
    def check(cls, config: ConfigT, num_experts: int) -> None:
        """Raise UsageError when the options do not fit the number of experts."""

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        """Assign the tokens `x_TD` (fp32) to experts."""
        raise NotImplementedError

    @property
    def traits(self) -> RouterTraits:
        """Properties that depend on the options and on the mode, training or evaluation."""
        return RouterTraits(
            has_variable_k=ROUTERS.get(self.config.name).facts.variable_k,
            has_state=type(self).after_step is not Router.after_step,
        )

    def losses(self, record: LayerRecord) -> Mapping[str, LossValue]:
        """Return the raw losses that only this algorithm has, by the names in its `Facts.own_losses`.

        Sum and average over the tokens of all processes with `reduce_record`, which exchanges the sums of all layers
        at once; `record.total` and `record.mean` exchange each one by itself.
        """
        return {}

    def objective(self, record: LayerRecord) -> Tensor | None:
        """Return a loss for each token, [T], computed from `record.token_loss_T` (reinforcement); None: there is none.

        Training takes its mean over the step's positions, as of the task loss, and handles padding, micro-batches and
        processes.
        """
        return None

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return what `after_step` needs besides the loads: sums over this process's tokens, without padding.

        In training the record holds the task loss of each token. Sums add up over micro-batches and processes however a
        batch is divided; a quantile does not, but the counts of a histogram do.
        """
        return {}

    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Update state (bias, thresholds) once per optimizer step.

        `load_E`: the step's assignments before capacity, int64. `statistics`: what `Router.statistics` returned. Both
        are summed over micro-batches and processes.
        """


def check_top_k(top_k: int, num_experts: int, smallest: int = 1, why: str = "", *, key: str = "top_k") -> None:
    """Raise UsageError unless smallest <= top_k <= num_experts; `key` is the option that sets k."""
    if num_experts < smallest:  # no value of the option fits
        reason = f" ({why})" if why else f": router.{key} is at least {smallest}"
        raise UsageError(f"layout.num_experts must be at least {smallest} with this router, got {num_experts}{reason}")
    if not smallest <= top_k <= num_experts:
        reason = f"; {why}" if why and top_k < smallest else ""
        allowed = f"{smallest} to {num_experts}" if smallest < num_experts else f"{smallest}"
        raise UsageError(
            f"router.{key}={top_k} does not fit layout.num_experts={num_experts} (allowed: {allowed}{reason})"
        )


ROUTERS: Registry[type[Router], Facts] = Registry(
    "router", "moebench.routing.routers", item_type=Router, config_type=RouterConfig, facts_type=Facts
)


def required_features(config: RouterConfig) -> tuple[Feature, ...]:
    """Return the features that a configured router needs."""
    entry = ROUTERS.get(config.name, where="router.name")
    features = entry.item.required_features(config)
    if not (isinstance(features, tuple | list) and all(isinstance(feature, Feature) for feature in features)):
        raise UsageError(
            f"router '{config.name}' ({entry.origin}): required_features must return a tuple of Feature objects,"
            f" got {features!r}"
        )
    return tuple(features)
