"""SMEAR: soft merging of experts, one merged network for each sequence (arXiv:2306.03745).

The mean of a sequence's token vectors gives softmax weights, by which the experts' parameters are averaged. All tokens
of the sequence go through the merged network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.mixing import MergeRouting, split_into_segments
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterBuildContext, RouterConfig


@ROUTERS.register(
    Facts(
        family="soft",
        equation="r = mean_t x_t,  w = softmax(s · LN(W) LN(r) / √D),  θ̄ = Σ_e w_e θ_e,  y_t = E(x_t; θ̄)",
        paper="arXiv:2306.03745, section 3",
        use="For fully differentiable experts of whole sequences, in classification or in an encoder.",
        beware="Routing depends on the whole sequence, so it leaks the targets of token-by-token prediction. The mean "
        "hides the needs of single tokens.",
        causality=Causality(
            causal=False,
            reason="the merge depends on the mean of the whole sequence",
            batch_dependent=False,
            reads_sequence=True,
        ),
        variable_k=True,  # expert dropout in training
        makes_scores=False,
    )
)
class Smear(Router["Smear.Config"]):
    """Soft merging of experts with adaptive routing (Muqeeth, Liu and Raffel 2023).

    The experts' parameters are averaged instead of selecting experts: one network per sequence, so every expert and the
    router learn from every token by backpropagation, at the cost of one expert per token and one merge per sequence. As
    in the released code, the mean of the sequence and the rows of the router are normalised, and experts are dropped at
    random in training. There the rows have a learned gain for each dimension, initially 0.01; here a single scale s,
    divided by √D so that logits do not grow with the width. In the released encoder-decoder the decoder is routed by
    the mean of the encoder's output, which contains no target; here every layer is routed by the mean of its own input,
    in a decoder too.
    """

    form = Form.MERGED

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of SMEAR."""

        name: str = "smear"
        init_std: float = 0.28
        """Initial standard deviation s of the logits; that of the released code at its width, 0.01 · √768."""
        expert_dropout: float = 0.1
        """Probability that an expert is dropped from a sequence's merge in training; the others share its weight."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.scale = nn.Parameter(torch.full((), config.init_std))
        self.expert_dropout = config.expert_dropout
        self.sequence_length = context.data.sequence_length

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        dropout = config.expert_dropout
        require(0 <= dropout < 1, "router.expert_dropout", dropout, "at least 0 and below 1")
        require(config.init_std > 0, "router.init_std", config.init_std, "greater than 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> MergeRouting:
        mean_GD = compute_segment_means(x_TD, ctx, ctx.sequence_length)
        width = (x_TD.shape[-1],)
        rows_ED = functional.layer_norm(self.gate.weight_ED.float(), width)
        logits_GE = functional.linear(functional.layer_norm(mean_GD, width), rows_ED) * (self.scale / width[0] ** 0.5)
        weight_GE = logits_GE.softmax(-1)
        if ctx.training and self.expert_dropout > 0:
            weight_GE = self._drop_experts(
                weight_GE, ctx.uniform(x_TD.shape[0], self.num_experts)[:: ctx.sequence_length]
            )
        return MergeRouting(
            weight_GE=weight_GE,
            num_tokens=x_TD.shape[0],
            sequence_length=ctx.sequence_length,
            segment_length=ctx.sequence_length,
            logits_GE=logits_GE,
            valid_T=ctx.valid_T,
        )

    def _drop_experts(self, weight_GE: Tensor, draw_GE: Tensor) -> Tensor:
        """Drop experts and renormalise the weights of the others; keep all if none would be left."""
        kept_GE = draw_GE >= self.expert_dropout
        kept_GE = kept_GE | ~kept_GE.any(-1, keepdim=True)
        weight_GE = weight_GE * kept_GE + 1e-10 * kept_GE  # the kept experts may all have weight 0
        return weight_GE / weight_GE.sum(-1, keepdim=True)

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        return 1 + self.num_experts / (self.sequence_length or 1)

    @override
    def flops_per_token(self) -> int:
        return 2 * self.gate.weight_ED.numel() // (self.sequence_length or 1)


def compute_segment_means(x_TD: Tensor, ctx: RouteContext, segment_length: int) -> Tensor:
    """Return the mean vector of each segment's tokens in fp32, without padding; 0 for a segment of padding only."""
    valid_T1 = x_TD.new_ones(x_TD.shape[0], 1) if ctx.valid_T is None else ctx.valid_T.unsqueeze(-1).to(x_TD.dtype)
    sum_GD = split_into_segments(x_TD * valid_T1, ctx.sequence_length, segment_length).float().sum(1)
    return sum_GD / split_into_segments(valid_T1, ctx.sequence_length, segment_length).float().sum(1).clamp(min=1)
