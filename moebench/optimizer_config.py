"""The options of optimizer and schedule: part of the section `train` of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moebench.ranges import AT_LEAST_0_FINITE, BELOW_1, FRACTION, POSITIVE_FINITE, Range, at_least_1_up_to

ParameterGroup = Literal["hidden", "experts", "router", "embeddings", "head"]
"""What a parameter belongs to: attention, dense and shared networks and norms; routed experts; routers with their gates
and features; the input; the output."""
PARAMETER_GROUPS: tuple[ParameterGroup, ...] = ("hidden", "experts", "router", "embeddings", "head")
MUON_KEYS = ("muon_learning_rate", "muon_momentum", "muon_scaling")
DECAY_KEYS = ("decay_fraction", "decay_shape")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of `train` that choose the optimizer, the learning rate of each parameter, and the schedule."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "muon_learning_rate": POSITIVE_FINITE,
        "muon_momentum": BELOW_1,
        **dict.fromkeys(("router_learning_rate", "expert_learning_rate"), AT_LEAST_0_FINITE),
        **dict.fromkeys(("embedding_learning_rate", "head_learning_rate"), AT_LEAST_0_FINITE),
        "decay_fraction": FRACTION,
        "mup_base_width": at_least_1_up_to(2**16),
    }

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrices of attention, feed-forward networks and experts: AdamW, or Muon, which updates each
    matrix of each expert separately. AdamW always updates embeddings, head, routers, biases and gains."""
    muon_learning_rate: float | None = None
    """Peak learning rate of the matrices that Muon updates; null: learning_rate, which muon_scaling=match_rms_adamw is
    made for."""
    muon_momentum: float = 0.95
    """Muon's coefficient of the running mean of gradients (Nesterov)."""
    muon_scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale of Muon's update of an n_out x n_in matrix. match_rms_adamw: 0.2 sqrt(max(n_out, n_in)), the usual size of
    AdamW's updates (Moonlight, arXiv:2502.16982, section 2.2); original: sqrt(max(1, n_out / n_in)) (Keller Jordan),
    which needs a larger learning rate."""
    router_learning_rate: float | None = None
    """Peak learning rate of gates and all other parameters of routers; 0 freezes them; null: learning_rate."""
    expert_learning_rate: float | None = None
    """Peak learning rate of routed experts, whose tokens are a part of the batch; 0 freezes them; null: that of the
    other matrices."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the input: token, patch, frame and position embeddings, also where the output shares them;
    null: learning_rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of the output; null: learning_rate."""
    weight_decay_groups: list[ParameterGroup] = field(default_factory=lambda: list(PARAMETER_GROUPS))
    """Groups whose matrices are decayed: hidden (attention, dense and shared networks), experts, router, embeddings,
    head. Biases and gains are never decayed."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Learning rate after the warm-up; wsd: constant, then a decay at the end (warm-up, stable, decay:
    arXiv:2404.06395)."""
    decay_fraction: float = 0.2
    """With schedule=wsd: share of the steps in which the learning rate decays."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """With schedule=wsd: shape of the decay; sqrt is 1 - sqrt(q), the best one in arXiv:2405.18392."""
    trainable: Literal["all", "experts", "routers", "shared", "new_experts"] = "all"
    """Parameters that are updated. experts: routed experts; routers: routers with their gates; shared: all but these
    two; new_experts: routed experts that the parent of `init` lacks, or that are not copies of its dense network. All
    other parameters have no gradient, no optimizer state and no decay, and frozen routers keep their state."""
    mup_base_width: int | None = None
    """Width-scaled initialisation and learning rates (muP, arXiv:2203.03466, table 3): d_model of the narrower model
    whose learning rates are used; null: the same values at every width."""

    def list_unused_keys(self) -> tuple[str, ...]:
        """Return the keys that have no effect with these options, so that they are no part of a cell's id."""
        return (
            *(MUON_KEYS if self.optimizer != "muon" else ()),
            *(DECAY_KEYS if self.schedule != "wsd" else ()),
            *(("trainable",) if self.trainable == "all" else ()),
        )
