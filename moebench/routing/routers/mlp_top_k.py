"""ModuleFormer's router: top-k of a two-layer gate with a mutual-information loss (arXiv:2306.04640).

The gate has a hidden layer with GELU and dropout; the k most probable experts are selected and weighted by their
probabilities. The loss maximises the mutual information between tokens and experts.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(A GELU(B x + b)),  w = p_top-k,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2306.04640 (ModuleFormer; the gate is that of its released code)",
        use="When a linear gate is too simple, and experts should be used evenly although each choice is confident.",
        beware="The mutual information is 0 both at collapse and at uniform routing, so training may start slowly. "
        "The gate costs more than a linear one.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class MLPTopK(Router["MLPTopK.Config"]):
    """Top-k of a two-layer gate with the mutual-information loss of ModuleFormer (Shen et al. 2023).

    Activation, dropout and bias of the hidden layer are those of the released gate; the paper's equation has a ReLU, no
    dropout and no bias (activation=relu, dropout=0, bias=false). The loss rewards even use of experts over all tokens
    and a confident choice for each token. Its coefficient is our choice. The released code pools the statistics of all
    layers; here each layer has its own, as for every loss.
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
        """Fraction of hidden activations set to 0 in training (the released gate's default; its model configuration
        sets 0)."""
        bias: bool = True
        """Add a bias to the hidden layer, initially 0."""
        losses: dict[str, float] = field(default_factory=lambda: {"mutual_information": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.top_k = config.top_k
        # He initialisation (variance 2): the activation silences half of the units.
        self.hidden_gate = Gate(context.d_model, config.hidden_width, init_scale=2.0, bias=config.bias)
        self.gate = Gate(config.hidden_width, context.num_experts)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.hidden_width >= 1, "router.hidden_width", config.hidden_width, "at least 1")
        require(0 <= config.dropout < 1, "router.dropout", config.dropout, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        activate = functional.gelu if self.options.activation == "gelu" else functional.relu
        hidden_TH = activate(self.hidden_gate(x_TD))
        if ctx.training and self.options.dropout > 0:
            kept_TH = ctx.uniform(*hidden_TH.shape) >= self.options.dropout
            hidden_TH = hidden_TH * kept_TH / (1 - self.options.dropout)
        logits_TE = self.gate(hidden_TH)
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=self.top_k))
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
