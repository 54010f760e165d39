"""What a router is: a small module that assigns tokens to experts, with a typed Config and facts about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moebench.components import RouterConfig as RouterConfig
from moebench.errors import UsageError
from moebench.registry import Registry
from moebench.routing.context import RouteContext
from moebench.routing.level import SINGLE_LEVEL, Level
from moebench.routing.values import AnyRouting, LayerRecord


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a routing algorithm; shown by `list` and `show`, enforced by the contract tests."""

    family: str
    """The survey's families: token choice, expert choice, global assignment, static, stochastic, ... or baseline."""
    equation: str
    paper: str
    """arXiv number or DOI, and the equation or section."""
    causal: bool
    """Dropless, the routing of a token depends on no later token: measured, not believed."""
    causal_reason: str
    batch_dependent: bool
    """In evaluation, the routing of a sequence depends on what else is in the batch."""
    causal_with_capacity: bool | None = None
    """The same when a capacity drops by this router's priority; None: as `causal`."""
    causal_in_evaluation: bool | None = None
    """The same in evaluation, for routers that balance over the batch in training alone; None: as `causal`."""
    draws_in_evaluation: bool = False
    """Draws in evaluation too, by the batch and a token's place in it, which then matter in no other way."""
    learned: bool = True
    """It has parameters, and the task loss reaches them through the weights unless they are `taught`."""
    taught: tuple[str, ...] = ()
    """Its parameters and modules that learn from its own losses or its objective alone (rerouting, which weighs by
    scores, is a weight too)."""
    makes_scores: bool = True
    """Scores every expert for every token: what some losses, and rerouting over capacity, need."""
    needs_labels: bool = False
    """Reads to which expert each token belongs, which only made data says."""
    own_losses: tuple[str, ...] = ()
    """Names that `losses(record)` of this router brings."""
    balanced: bool = False
    """In training every expert has the same load whatever the tokens are, where the sizes divide: measured."""
    variable_k: bool = False
    """Tokens have another number of experts than `experts_per_token`, in training or in evaluation: measured."""
    cost: str = "T·E"
    """How the time to route T tokens to E experts grows, beside the gate's product."""
    use: str = ""
    """When one would choose it; every router of moebench itself says so."""
    beware: str = ""
    """What can go wrong with it; the same."""

    def is_causal(self, *, with_capacity: bool) -> bool:
        """Whether no token's output depends on later tokens, with or without a capacity."""
        return self.causal and (not with_capacity or self.causal_with_capacity in (None, True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """Where a router is built: the sizes around it and what the data says before training."""

    d_model: int
    num_experts: int
    layer: int = 0
    vocab_size: int | None = None
    token_count_V: Tensor | None = None
    """int64: how often each token id occurs in the training split (language only)."""
    token_pairs: Callable[[], Tensor] | None = None
    """Returns how often each id (row) is followed by each (column) in the training split, int64 [V, V]."""
    sequence_length: int | None = None
    """Tokens of one sequence of the task, where it is known."""
    num_domains: int | None = None
    """Domains that the task trains on; None where it has none."""
    embedding_width: int = 0
    """Numbers per token of the embedding that all routers share (`RouteContext.embedding_TD`); 0: there is none."""
    free_E: tuple[bool, ...] = ()
    """Which experts are without a network (zero, copy, constant); empty: none."""
    level: Level = SINGLE_LEVEL
    """Which part of the choice the router makes, in a layout of groups."""


class Router(nn.Module):
    """Assigns tokens to experts: owns its gate and its state, and answers four questions.

    It never drops for capacity, never talks to other ranks, never touches experts: that is shared by all
    routers, so that two arms of a comparison differ in the routing algorithm and in nothing else.
    """

    Config: ClassVar[type[RouterConfig]]
    is_dense: ClassVar[bool] = False
    """Needs one expert only: a model built with it holds plain feed-forward networks instead of banks."""
    is_soft: ClassVar[bool] = False
    """Returns a SoftRouting or a MergeRouting: nothing is chosen, so capacity and overflow do not apply."""
    merges: ClassVar[bool] = False
    """Returns a MergeRouting: needs experts of one shape, all of them on every process."""
    is_chain: ClassVar[bool] = False
    """Returns a ChainRouting: experts are steps one behind another, and none can be left out for lack of a slot."""
    consistency: float = 0.0
    """Coefficient of how far two passes over the same batch, with other draws, are from saying the same; where it is
    not 0, training makes both passes."""

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.config = config
        self.num_experts = site.num_experts

    @classmethod
    def embedding(cls, config: Any) -> tuple[int, float]:
        """Return the width of the shared embedding that the router reads, and the coefficient of its own loss.

        (0, 0) where it reads none.
        """
        return 0, 0.0

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        """Experts that one token uses (on average, where it varies): sets the width of experts in matched arms."""
        return 1

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Raise UsageError when the options do not fit the number of experts."""

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        """Assign the tokens `x_TD` (fp32) to experts."""
        raise NotImplementedError

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a token's routing depends on other sequences of the batch: many processes then gather it first.

        Each of them routes all tokens and keeps what concerns its own.
        """
        return False

    @classmethod
    def sequence_group_size(cls, config: Any) -> int:
        """Sequences, one after another, that are computed together: each process must hold a multiple of it."""
        return 1

    @property
    def has_variable_k(self) -> bool:
        """Whether tokens may have another number of experts than `experts_per_token`, with the options that it has."""
        return ROUTERS.get(self.config.name).facts.variable_k

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Raw losses that the algorithm brings itself, by the names in its `Facts.own_losses`.

        Sums and means over tokens are taken by `record.total` and `record.mean`, which know the other processes.
        """
        return {}

    def objective(self, record: LayerRecord) -> Tensor | None:
        """A loss for each token, [T], that learns from `record.token_loss_T` (reinforcement); None for all others.

        Training takes its mean over the step's positions, as of the task loss: padding, micro-batches and processes
        are none of the router's business.
        """
        return None

    @property
    def has_state(self) -> bool:
        """Whether `after_step` does anything."""
        return type(self).after_step is not Router.after_step

    def sums(self, record: LayerRecord) -> dict[str, Tensor]:
        """What `after_step` needs beside the loads, as plain sums over this process's tokens, padding left out.

        In training the record holds the task loss of each token. Sums, because these add up over micro-batches and
        processes whatever way a batch is divided; a quantile does not, but the counts of a histogram do.
        """
        return {}

    def after_step(self, load_E: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Update state (bias, thresholds) once per optimizer step.

        `load_E`: the step's assignments before capacity, int64; `sums`: what `sums` returned. Both are added up over
        micro-batches and processes.
        """

    def rows_per_token(self, experts_per_token: int) -> float:
        """Rows that the experts compute for one token, on average: its experts, unless rows are not tokens.

        To merge E experts costs as much as E rows through one of them: 2 FLOPs per weight.
        """
        return experts_per_token

    def flops_per_token(self) -> int:
        """Forward FLOPs of the router for one token: 2 per weight of each matrix."""
        return sum(2 * parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Forward FLOPs of the router for the positions of a record, fp64 scalar; it looks at each of them once."""
        return record.num_positions * self.flops_per_token()


def check_top_k(top_k: int, num_experts: int, smallest: int = 1, why: str = "", *, key: str = "top_k") -> None:
    """Raise UsageError unless smallest <= top_k <= num_experts; `key` is the option that says k."""
    if not smallest <= top_k <= num_experts:
        reason = f"; {why}" if why and top_k < smallest else ""
        raise UsageError(
            f"router.{key}={top_k} does not fit layout.num_experts={num_experts}"
            f" (allowed: {smallest} to {num_experts}{reason})"
        )


ROUTERS: Registry[type[Router], Facts] = Registry("router", "moebench.routing.routers")
