"""SpeechMoE: top-1 with losses that make each choice sparse and the mean choice even."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.switch import Switch
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  i = argmax_e p_e,  y = p_i · E_i(x);  losses ‖p/‖p‖₂‖₁ and E · Σ_e mean(p_e)²",
        paper="arXiv:2105.03036, section 2.3",
        use="Speech: top-1 whose losses need no counts, one for sure frames and one for even use.",
        beware="Both losses look at probabilities and not at choices, so loads may be uneven while the losses "
        "look well. The sparsity loss alone invites collapse.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
        own_losses=("sparsity", "mean_importance"),
    )
)
class SpeechMoE(Switch):
    """Switch with the losses of SpeechMoE (You et al. 2021), both without counts of assignments.

    Sparsity is between 1 (one expert is certain) and √E (all are equal), mean importance between 1 (even) and E. The
    paper also gives every router the output of one embedding network that is trained by a loss of its own, CTC
    there, here that of the task (`embedding: shared`). The coefficients are those of ports; the paper's were not
    checked.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options of SpeechMoE."""

        name: str = "speech_moe"
        jitter: float = 0.0
        """In training the router's input is multiplied by U(1 - jitter, 1 + jitter), the experts' input is not."""
        embedding: Literal["layer", "shared"] = "layer"
        """What the gate reads: its layer's input alone, or also one small network's output, the same in all layers."""
        embedding_width: int = 16
        """Numbers per token of that network's output (embedding=shared)."""
        embedding_loss: float = 0.01
        """Coefficient of that network's own loss, the task's loss of what it says by itself (embedding=shared)."""
        losses: dict[str, float] = field(default_factory=lambda: {"sparsity": 0.1, "mean_importance": 0.1})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.reads_embedding = config.embedding == "shared"
        if self.reads_embedding:
            self.gate = Gate(context.d_model + context.embedding_width, context.num_experts)

    @classmethod
    def embedding(cls, config: Config) -> tuple[int, float]:
        """Return width and coefficient if the gate reads the shared embedding."""
        return (config.embedding_width, config.embedding_loss) if config.embedding == "shared" else (0, 0.0)

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse an embedding of nothing and a negative coefficient."""
        super().check(config, num_experts)
        require(config.embedding_width >= 1, "router.embedding_width", config.embedding_width, "at least 1")
        require(config.embedding_loss >= 0, "router.embedding_loss", config.embedding_loss, "at least 0")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Route as Switch does, by the layer's input or by that and the shared embedding side by side."""
        if self.reads_embedding:
            assert ctx.embedding_TD is not None
            x_TD = torch.cat([x_TD, ctx.embedding_TD.float()], dim=-1)
        return super().forward(x_TD, ctx)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return mean_t ‖p_t/‖p_t‖₂‖₁ and E · Σ_e mean_t(p_te)²."""
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        sparsity = record.mean(functional.normalize(scores_TE, dim=-1).sum(-1))
        return {"sparsity": sparsity, "mean_importance": self.num_experts * record.mean(scores_TE).square().sum()}
