"""Lory: the experts' parameters are merged for each segment, by what the segment before it says."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.mixing import MergeRouting, count_segments
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterBuildContext, RouterConfig
from moebench.routing.routers.smear import segment_means


@ROUTERS.register(
    Facts(
        family="soft",
        equation="w_s = softmax(W mean(x of segment s-1)),  w_1 = softmax(b),  θ̄_s = Σ_e w_se θ_e,  y_t = E(x_t; θ̄_s)",
        paper="arXiv:2405.03133, section 3 (causal segment routing)",
        use="Fully differentiable experts in a decoder: every expert learns from every token, and nothing leaks.",
        beware="Merging costs memory for each segment. A segment is routed by the one before it, so a change "
        "of topic comes late. The paper's dense warm-up is left out.",
        causality=Causality(
            causal=True,
            reason="a segment's merge depends on the segment before it alone; the first one has a learned merge",
            batch_dependent=False,
        ),
        balanced=True,
        makes_scores=False,
    )
)
class Lory(Router["Lory.Config"]):
    """Fully differentiable experts for autoregressive models (Zhong et al. 2024).

    The paper merges the first segment by its own mean, without a gradient, which tells its early tokens something of
    its later ones; here it has a learned merge (b, even at the start), so nothing leaks. The paper trains a dense model
    for the first 5 % of the steps and copies its feed-forward networks into all experts; here experts differ from the
    start and there is no such phase. The paper also routes a whole answer by its prompt and trains on similar documents
    side by side; here evaluation routes segment by segment as training does, and the data are those of every other arm.
    """

    form = Form.MERGED

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Lory."""

        name: str = "lory"
        segment_length: int | None = None
        """Tokens that share a merge (the paper: 256); null: a quarter of the task's sequence. A merge costs as much as
        E tokens, so segments much shorter than E leave the experts little of a matched budget."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.first_E = nn.Parameter(torch.empty(context.num_experts))
        self.sequence_length = context.data.sequence_length
        self.segment_length = config.segment_length or max((context.data.sequence_length or 4) // 4, 1)

    def init_weights(self, generator: Generator) -> None:
        """Begin with an even merge for the first segment."""
        nn.init.zeros_(self.first_E)

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse segments without a token."""
        length = config.segment_length
        require(length is None or length >= 1, "router.segment_length", length, "at least 1, or null")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> MergeRouting:
        """Weigh the experts for each segment by the mean of the one before it."""
        segment_length = min(self.segment_length, ctx.sequence_length)
        of_one = count_segments(ctx.sequence_length, segment_length)
        mean_BSD = segment_means(x_TD, ctx, segment_length).view(-1, of_one, x_TD.shape[-1])
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

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return a row for each place of a segment, and the token's part of the merges, each of which costs E rows."""
        length = self.sequence_length or self.segment_length
        segment_length = min(self.segment_length, length)
        return count_segments(length, segment_length) * (segment_length + self.num_experts) / length

    def flops_per_token(self) -> int:
        """Return the token's part of the gate, which sees one mean for each segment but the last."""
        length = self.sequence_length or self.segment_length
        seen = count_segments(length, min(self.segment_length, length)) - 1
        return 2 * self.gate.weight_ED.numel() * seen // length
