"""Lory: expert parameters are merged for each segment, weighted by the segment before (arXiv:2405.03133).

A sequence is cut into segments. The mean of a segment's tokens gives softmax weights by which the experts' parameters
are averaged into the one network of the next segment. The first segment has learned weights.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.mixing import MergeRouting, count_segments
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterBuildContext, RouterConfig
from moebench.routing.routers.smear import compute_segment_means


@ROUTERS.register(
    Facts(
        family="soft",
        equation="w_s = softmax(W mean(x of segment s-1)),  w_1 = softmax(b),  θ̄_s = Σ_e w_se θ_e,  y_t = E(x_t; θ̄_s)",
        paper="arXiv:2405.03133, section 3 (causal segment routing)",
        use="For fully differentiable experts in a decoder: every expert learns from every token, and routing is "
        "causal.",
        beware="Merging costs memory for each segment. A segment is routed by the one before, so a change of topic is "
        "followed late. The paper's dense warm-up is left out.",
        causality=Causality(
            causal=True,
            reason="a segment's merge depends on the segment before it only; that of the first is learned",
            batch_dependent=False,
            reads_sequence=True,
        ),
        balanced=True,
        makes_scores=False,
    )
)
class Lory(Router["Lory.Config"]):
    """Fully differentiable experts for autoregressive models (Zhong et al. 2024).

    The paper merges the first segment by its own mean, without gradient, which leaks information about later tokens to
    earlier ones; here its weights are learned (b, uniform at the start). The paper trains a dense model for the first
    5 % of the steps and copies its feed-forward networks to all experts; here experts are initialised differently and
    there is no such phase. The paper also routes a whole answer by its prompt and trains on similar documents side by
    side; here evaluation routes by segments as training does, on the same data as every other arm.
    """

    form = Form.MERGED

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Lory."""

        name: str = "lory"
        segment_length: int | None = None
        """Tokens per segment (256 in the paper); null: a quarter of the task's sequence. A merge costs as much as E
        tokens, so segments much shorter than E leave little of a matched budget to the experts."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.first_E = nn.Parameter(torch.empty(context.num_experts))
        self.sequence_length = context.data.sequence_length
        self.segment_length = config.segment_length or max((context.data.sequence_length or 4) // 4, 1)

    def init_weights(self, generator: Generator) -> None:
        """Initialise uniform merging weights for the first segment."""
        nn.init.zeros_(self.first_E)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        length = config.segment_length
        require(length is None or length >= 1, "router.segment_length", length, "at least 1, or null")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> MergeRouting:
        segment_length = min(self.segment_length, ctx.sequence_length)
        segments_per_sequence = count_segments(ctx.sequence_length, segment_length)
        mean_BSD = compute_segment_means(x_TD, ctx, segment_length).view(-1, segments_per_sequence, x_TD.shape[-1])
        first_B1E = self.first_E.float().expand(mean_BSD.shape[0], 1, -1)
        logits_BSE = torch.cat([first_B1E, self.gate(mean_BSD[:, :-1])], dim=1)
        logits_GE = logits_BSE.flatten(0, 1)
        return MergeRouting(
            weight_GE=logits_GE.softmax(-1),
            num_tokens=x_TD.shape[0],
            sequence_length=ctx.sequence_length,
            segment_length=segment_length,
            logits_GE=logits_GE,
            valid_T=ctx.valid_T,
        )

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        length = self.sequence_length or self.segment_length
        segment_length = min(self.segment_length, length)
        # One row per position of a segment, and one merge per segment, which costs E rows.
        return count_segments(length, segment_length) * (segment_length + self.num_experts) / length

    @override
    def flops_per_token(self) -> int:
        length = self.sequence_length or self.segment_length
        # One mean for each segment but the last goes through the gate.
        num_means = count_segments(length, min(self.segment_length, length)) - 1
        return 2 * self.gate.weight_ED.numel() * num_means // length
