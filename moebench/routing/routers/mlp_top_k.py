"""A gate with a hidden layer, trained to tell as much as it can about the token: ModuleFormer's router."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(A GELU(B x + b)),  w = p_top-k,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2306.04640 (ModuleFormer; the gate is that of its released code)",
        use="When a linear gate seems too simple, and experts shall be used evenly while tokens stay sure.",
        beware="Mutual information is as low at collapse as at uniform routing: it may start slowly. The gate "
        "costs more than a linear one.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class MLPTopK(Router["MLPTopK.Config"]):
    """Top-k of a two-layer gate with the mutual-information loss of ModuleFormer (Shen et al. 2023).

    Activation, dropout and bias of the hidden layer are those of the released gate; the paper's equation has a ReLU and
    neither of the others (activation=relu, dropout=0, bias=false). The loss wants experts to be used evenly and every
    token to be sure, and nothing of each sequence or step. Its coefficient here is a choice of ours. The published code
    pools the statistics of all layers; here each layer has its own, as for every loss.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of the two-layer gate."""

        name: str = "mlp_top_k"
        top_k: int = 2
        """Experts per token."""
        hidden_width: int = 64
        """Width of the gate's hidden layer (256 in the source, whose models are wide)."""
        activation: Literal["gelu", "relu"] = "gelu"
        """Activation of the hidden layer."""
        dropout: float = 0.1
        """Share of the hidden activations that is set to 0 in training (0.1 is the default of the released gate; the
        released model configuration sets 0)."""
        bias: bool = True
        """Whether the hidden layer has a bias, 0 at the start."""
        losses: dict[str, float] = field(default_factory=lambda: {"mutual_information": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.top_k = config.top_k
        # A variance of 2: half of the units are silent.
        self.hidden_gate = Gate(context.d_model, config.hidden_width, init_scale=2.0, bias=config.bias)
        self.gate = Gate(config.hidden_width, context.num_experts)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E, a hidden layer without units and a dropout of everything."""
        check_top_k(config.top_k, num_experts)
        require(config.hidden_width >= 1, "router.hidden_width", config.hidden_width, "at least 1")
        require(0 <= config.dropout < 1, "router.dropout", config.dropout, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its k most probable experts."""
        activate = functional.gelu if self.options.activation == "gelu" else functional.relu
        hidden_TH = activate(self.hidden_gate(x_TD))
        if ctx.training and self.options.dropout > 0:
            kept_TH = ctx.uniform(*hidden_TH.shape) >= self.options.dropout
            hidden_TH = hidden_TH * kept_TH / (1 - self.options.dropout)
        logits_TE = self.gate(hidden_TH)
        scores_TE = logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
