"""The networks of Chen et al. 2022: patch networks as experts behind a top-1 router with uniform noise."""

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.calibration.chen2022.data import NUM_PATCHES, PATCH_LENGTH
from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import LayerRecord, Routing
from moebench.seeds import make_generator

NUM_EXPERTS = 8
FILTERS_PER_CLASS = 8
"""Filters of an expert for each of the two classes."""
SINGLE_FILTERS_PER_CLASS = 40
"""Filters of the single network for each class."""
EXPERT_INIT_SCALE = 0.001
"""Factor on the initial weights of experts: small at the start, as their theory requires."""
NUM_CLASSES = 2


class PatchBank(Bank):
    """Experts that are one layer of filters: y_c = Σ over patches p and the filters j of class c of σ(w_j · x_p + b_j).

    σ is the cube, or the identity for linear experts.
    """

    needs_loads_on_host: ClassVar[bool] = True

    def __init__(self, num_experts: int, filters_per_class: int, *, is_cubic: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.is_cubic = is_cubic
        num_filters = NUM_CLASSES * filters_per_class
        self.weight_EIF = nn.Parameter(torch.empty(num_experts, PATCH_LENGTH, num_filters))
        self.bias_EF = nn.Parameter(torch.empty(num_experts, num_filters))

    @torch.no_grad()
    def draw_weights(self, scale: float, generator: Generator) -> None:
        """Draw weights and biases uniformly, as `nn.Conv1d` does, times `scale`."""
        bound = scale * PATCH_LENGTH**-0.5
        for parameter in (self.weight_EIF, self.bias_EF):
            parameter.uniform_(-bound, bound, generator=generator)

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        rows_of_experts = torch.split(x_RD, load_E.tolist())
        return torch.cat([self.expert(x_rD, index) for index, x_rD in enumerate(rows_of_experts)])

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        x_RPI = x_RD.view(-1, NUM_PATCHES, PATCH_LENGTH)
        hidden_RPF = torch.addmm(self.bias_EF[index], x_RPI.flatten(0, 1), self.weight_EIF[index])
        if self.is_cubic:
            hidden_RPF = hidden_RPF**3
        return hidden_RPF.view(-1, NUM_PATCHES, NUM_CLASSES, hidden_RPF.shape[1] // NUM_CLASSES).sum((1, 3))

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (2 * NUM_PATCHES * self.weight_EIF[0].numel(),) * self.num_experts


class UniformNoiseTop1(Router[RouterConfig]):
    """Top-1 by logits plus U(0, 1) noise, weighted by the noisy logit itself; the gate starts at zero.

    The logits of an example are sums over its patches. The noise stays in evaluation, as in the published figures. It
    is no router of experiments, where experts need weights that do not vanish.
    """

    def __init__(self, config: RouterConfig, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts, init_scale=0.0)

    @property
    @override
    def traits(self) -> RouterTraits:
        return RouterTraits()

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD.view(-1, NUM_PATCHES, PATCH_LENGTH).sum(1))
        noisy_TE = logits_TE + ctx.uniform(*logits_TE.shape)
        expert_TK = rank_top_k(noisy_TE.detach(), 1)
        weight_TK = noisy_TE.gather(-1, expert_TK)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=noisy_TE)


class PatchMixture(nn.Module):
    """An `MoELayer` of patch networks and nothing else: its output is that of the model, [T, NUM_CLASSES]."""

    def __init__(self, *, is_cubic: bool, seed: int) -> None:
        super().__init__()
        context = RouterBuildContext(d_model=PATCH_LENGTH, num_experts=NUM_EXPERTS)
        router = UniformNoiseTop1(RouterConfig(name="uniform_noise_top1"), context)
        router.gate.init_weights(make_generator(seed, "gate"))
        bank = PatchBank(NUM_EXPERTS, FILTERS_PER_CLASS, is_cubic=is_cubic)
        bank.draw_weights(EXPERT_INIT_SCALE, make_generator(seed, "experts"))
        self.layer = MoELayer(router, bank, LayerOptions(experts_per_token=1))
        self.bank = bank
        self.router = router
        self.seed = seed

    def forward(self, x_TD: Tensor, *purpose: object) -> tuple[Tensor, LayerRecord]:
        """Return the outputs and the record; `purpose` seeds the routing noise."""
        generator = make_generator(self.seed, "router", *purpose)
        outputs: tuple[Tensor, LayerRecord] = self.layer(
            x_TD, RouteContext(training=self.training, generator=generator, sequence_length=1)
        )
        return outputs
