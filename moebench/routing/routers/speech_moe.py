"""SpeechMoE: top-1 with losses that make each choice sparse and the mean choice even."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from moebench.routing.router import ROUTERS, Facts
from moebench.routing.routers.switch import Switch
from moebench.routing.values import LayerRecord


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  i = argmax_e p_e,  y = p_i · E_i(x);  losses ‖p/‖p‖₂‖₁ and E · Σ_e mean(p_e)²",
        paper="arXiv:2105.03036, section 2.3",
        use="Speech: top-1 whose losses need no counts, one for sure frames and one for even use.",
        beware="Both losses look at probabilities and not at choices, so loads may be uneven while the losses "
        "look well. The sparsity loss alone invites collapse.",
        causal=True,
        causal_reason="each token is routed by its own vector; over capacity, the earlier token stays",
        batch_dependent=False,
        own_losses=("sparsity", "mean_importance"),
    )
)
class SpeechMoE(Switch):
    """Switch with the losses of SpeechMoE (You et al. 2021), both without counts of assignments.

    Sparsity is between 1 (one expert is certain) and √E (all are equal), mean importance between 1 (even) and E. The
    paper also gives every router the output of one embedding network that is trained by a loss of its own: not here.
    The coefficients of 0.1 are those of ports; the paper's were not checked.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        """Options of SpeechMoE."""

        name: str = "speech_moe"
        jitter: float = 0.0
        """In training the router's input is multiplied by U(1 - jitter, 1 + jitter), the experts' input is not."""
        losses: dict[str, float] = field(default_factory=lambda: {"sparsity": 0.1, "mean_importance": 0.1})

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return mean_t ‖p_t/‖p_t‖₂‖₁ and E · Σ_e mean_t(p_te)²."""
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        sparsity = record.mean(functional.normalize(scores_TE, dim=-1).sum(-1))
        return {"sparsity": sparsity, "mean_importance": self.num_experts * record.mean(scores_TE).square().sum()}
