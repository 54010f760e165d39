"""What a decoder-only model is, apart from how moebench or transformers name its settings and its weights."""

from dataclasses import dataclass
from typing import Any, Literal

from moebench.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How experts are chosen and weighted: the k best scores of a linear gate, dropless."""

    score: Literal["softmax", "sigmoid"]
    """Function of the router logits."""
    top_k: int
    normalised: bool
    """Whether the k weights are divided by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    has_bias: bool = False
    """Whether a bias is added to the scores for the selection, and not to the weights."""
    num_groups: int = 1
    kept_groups: int = 1
    router: str = "top_k"
    """The router of moebench with the training losses of this family."""


@dataclass(frozen=True, kw_only=True)
class ExpertBlocks:
    """The experts of a model: the same in each block that has any."""

    blocks: tuple[int, ...]
    """Blocks with experts, ascending."""
    num_experts: int
    width: int
    """Hidden width of one expert."""
    shared_width: int = 0
    """Hidden width of the network that every token uses besides; 0: none."""
    routing: RoutingRule


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only model of token ids: pre-norm blocks with rotary positions, and a norm before the head."""

    model: ModelConfig
    """Its transformer; `ffn_width` is the width of its dense feed-forward networks."""
    vocab_size: int
    experts: ExpertBlocks | None = None
    """None: all blocks are dense."""

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        """Blocks with experts."""
        return self.experts.blocks if self.experts else ()

    @property
    def has_dense_blocks(self) -> bool:
        """Whether some block has a dense feed-forward network."""
        return len(self.expert_blocks) < self.model.num_layers

    def to_settings(self) -> dict[str, Any]:
        """Return the sections `layout` and `router` of a cell that has such experts."""
        if self.experts is None:
            return {"router": {"name": "dense"}}
        return {
            "layout": _describe_layout(self.experts, self.model.num_layers),
            "router": _describe_router(self.experts.routing),
        }


def _describe_layout(experts: ExpertBlocks, num_layers: int) -> dict[str, Any]:
    layout = {"num_experts": experts.num_experts, "expert_width": experts.width}
    has_all = len(experts.blocks) == num_layers
    if has_all and not experts.shared_width:
        return {"name": "every_n", "n": 1, **layout}
    blocks = None if has_all else list(experts.blocks)
    shared = experts.shared_width // experts.width
    return {"name": "fine_grained", "split": 1, "shared": shared, "blocks": blocks, **layout}


def _describe_router(routing: RoutingRule) -> dict[str, Any]:
    common = {"name": routing.router, "top_k": routing.top_k, "renormalise": routing.normalised}
    if routing.score == "softmax":
        return common
    groups = {"num_groups": routing.num_groups, "kept_groups": routing.kept_groups}
    return {**common, "scale": routing.scale, **groups}
