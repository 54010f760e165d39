"""Mixture of Tokens: each expert computes a weighted mean of the tokens at one position of several sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature
from moebench.routing.features.sequence_groups import SequenceGroups
from moebench.routing.gate import Gate
from moebench.routing.mixing import SoftRouting, scatter_to_groups, softmax_over_tokens
from moebench.routing.router import ROUTERS, Causality, Facts, Form, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord


@ROUTERS.register(
    Facts(
        family="soft",
        equation="M_e = softmax over the group (x W_e / τ),  m_e = Σ_t M_te x_t,  y_t = Σ_e M_te E_e(m_e)",
        paper="arXiv:2310.15961, section 3",
        use="For soft mixing in decoders: there is no discrete choice, loads are even, and no balance loss is needed.",
        beware="Every output depends on the other sequences of its group, in evaluation too. Mixed tokens come from "
        "unrelated texts.",
        causality=Causality(
            causal=True,
            reason="a token is mixed only with tokens at the same position of other sequences",
            batch_dependent=True,
        ),
        balanced=True,
        makes_scores=False,
    )
)
class MixtureOfTokens(Router["MixtureOfTokens.Config"]):
    """Continuous mixing for decoders (Antoniak et al. 2023).

    A group is the tokens at one position of `group_size` consecutive sequences of the batch: no token sees the future,
    and every output depends on the other sequences of its group, in evaluation too. The last group of a batch may be
    smaller and mix fewer tokens; a group of one is the sum of all experts. Each process holds complete groups, so the
    mixes are those of one process. Each expert computes 1 / group_size of the rows of an expert that sees every token.
    """

    form = Form.SOFT

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of Mixture of Tokens."""

        name: str = "mixture_of_tokens"
        group_size: int = 8
        """Sequences in a group; the batch must be a multiple of it."""
        temperature: float = 1.0
        """Temperature τ of the softmax: towards 0 each expert takes one token of the group."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.group_size = config.group_size
        self.temperature = config.temperature

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        # The rows that are computed for a token, rounded up.
        return -(-num_experts // config.group_size)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(config.group_size >= 1, "router.group_size", config.group_size, "at least 1")
        require(config.temperature > 0, "router.temperature", config.temperature, "greater than 0")

    @classmethod
    @override
    def required_features(cls, config: Config) -> tuple[Feature, ...]:
        return (SequenceGroups(size=config.group_size),)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> SoftRouting:
        num_tokens, length, size = x_TD.shape[0], ctx.sequence_length, self.group_size
        num_places = -(-num_tokens // (length * size)) * length * size
        token_T = torch.arange(num_tokens, device=x_TD.device)
        sequence_T, position_T = token_T // length, token_T % length
        place_T = (sequence_T // size * length + position_T) * size + sequence_T % size
        valid_T = torch.ones_like(token_T, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T
        valid_BL1 = scatter_to_groups(valid_T.unsqueeze(-1), place_T, num_places).view(-1, size, 1)
        logits_BLE = scatter_to_groups(self.gate(x_TD) / self.temperature, place_T, num_places).view(
            -1, size, self.num_experts
        )
        share_BLE = softmax_over_tokens(logits_BLE, valid_BL1)
        return SoftRouting(
            dispatch_BLS=share_BLE,
            combine_BLS=share_BLE,
            num_experts=self.num_experts,
            group_index_T=place_T,
            logits_BLS=logits_BLE,
        )

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        # One row for each expert and group.
        return self.num_experts / self.group_size

    @override
    def flops_per_token(self) -> int:
        # 2·E·D each: the logits, the mixing of a group, and the distribution of its output.
        return 3 * 2 * self.gate.weight_ED.numel()

    @override
    def executed_flops(self, record: LayerRecord) -> Tensor:
        # Missing tokens are mixed too: a group that is not full costs as much as a full one.
        routing = record.routing
        assert isinstance(routing, SoftRouting)
        num_groups, size, _ = routing.dispatch_BLS.shape
        num_empty = num_groups * size - routing.num_tokens
        return super().executed_flops(record) + num_empty * 2 * 2 * self.gate.weight_ED.numel()
