"""SpeechMoE: top-1 with losses that make each distribution sparse and the mean distribution even."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature
from moebench.routing.features.shared_embedding import SharedEmbedding
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.routers.switch import Switch
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  i = argmax_e p_e,  y = p_i · E_i(x);  losses ‖p/‖p‖₂‖₁ and E · Σ_e mean(p_e)²",
        paper="arXiv:2105.03036, section 2.3",
        use="For speech: top-1 with losses that need no counts, one for confident frames and one for even use.",
        beware="Both losses are computed on probabilities and not on choices, so loads may be uneven at a low "
        "loss. The sparsity loss alone invites collapse.",
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

    Sparsity is between 1 (one expert has all probability) and √E (uniform), mean importance between 1 (even) and E. The
    paper also feeds every router with the output of one embedding network that has its own loss: CTC there, the task's
    loss here (`embedding: shared`). The coefficients are those of ports; the paper's were not checked.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options of SpeechMoE."""

        name: str = "speech_moe"
        jitter: float = 0.0
        """In training the router's input is multiplied by U(1 - jitter, 1 + jitter), the experts' input is not."""
        embedding: Literal["layer", "shared"] = "layer"
        """Input of the gate: its layer's input alone, or also the output of one small network, the same in all
        layers."""
        embedding_width: int = 16
        """Width of that network's output (embedding=shared)."""
        embedding_loss: float = 0.01
        """Coefficient of that network's own loss, the task's loss on its predictions (embedding=shared)."""
        losses: dict[str, float] = field(default_factory=lambda: {"sparsity": 0.1, "mean_importance": 0.1})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.reads_embedding = config.embedding == "shared"
        if self.reads_embedding:
            self.gate = Gate(context.d_model + config.embedding_width, context.num_experts)

    @classmethod
    @override
    def required_features(cls, config: Any) -> tuple[Feature, ...]:
        if config.embedding == "layer":
            return ()
        return (SharedEmbedding(width=config.embedding_width, coefficient=config.embedding_loss),)

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        super().check(config, num_experts)
        require(config.embedding_width >= 1, "router.embedding_width", config.embedding_width, "at least 1")
        require(config.embedding_loss >= 0, "router.embedding_loss", config.embedding_loss, "at least 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        if self.reads_embedding:
            x_TD = torch.cat([x_TD, ctx.features[SharedEmbedding].float()], dim=-1)
        return super().forward(x_TD, ctx)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None

        def concentrate(mean_E: Tensor) -> Tensor:
            return self.num_experts * mean_E.square().sum()

        norm_T = functional.normalize(scores_TE, dim=-1).sum(-1)
        return {
            "sparsity": reduce_record(record, lambda mean: mean, means=[norm_T]),
            "mean_importance": reduce_record(record, concentrate, means=[scores_TE]),
        }
