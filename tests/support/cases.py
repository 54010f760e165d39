"""Cases of the contract tests: routers with options and numbers of experts, tokens, and slow references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.router_options import OPTIONS
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.experts.activation import activate
from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import chain_loop, double_loop, slot_loop
from moebench.models.transformer import init_weights
from moebench.routing.context import DataSummary, RouteContext
from moebench.routing.contract import ROUTING_OF_FORM
from moebench.routing.features.padding_mask import PaddingMask
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.features.token_pairs import TokenPairs
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import AnyRouting, ChainRouting

D_MODEL = 8
VOCAB = 50
NUM_EXPERTS = (1, 2, 8, 9)
NUM_TOKENS = (0, 1, 7, 64)


@dataclass(frozen=True)
class Case:
    """A router, its options and the number of experts."""

    name: str
    num_experts: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name of the case in test reports."""
        return "-".join([self.name, f"E{self.num_experts}", *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def router_class(self) -> type[Router]:
        return ROUTERS.get(self.name).item

    @property
    def facts(self) -> Facts:
        return ROUTERS.get(self.name).facts

    @property
    def config(self) -> Any:
        return self.router_class.Config(**self.options)

    @property
    def always_uses_8_experts(self) -> bool:
        """Whether a token uses 8 experts for any number of experts."""
        return self.experts_per_token == replace(self, num_experts=16).experts_per_token == 8

    @property
    def fits(self) -> bool:
        """Whether the router accepts these options with this number of experts."""
        try:
            self.router_class.check(self.config, self.num_experts)
        except UsageError:
            return False
        return True

    @property
    def is_soft(self) -> bool:
        """Whether the router mixes tokens or parameters instead of listing assignments."""
        return self.router_class.form.is_mixture

    @property
    def is_chain(self) -> bool:
        """Whether the experts form a chain of steps."""
        return self.router_class.form.is_chain

    @property
    def experts_per_token(self) -> int:
        return self.router_class.experts_per_token(self.config, self.num_experts)

    def router(self, seed: int = 0) -> Router:
        """Build the router with every parameter drawn from N(0, 1/2), which avoids ties."""
        router = self.router_class(self.config, build_context(self.num_experts))
        return randomise_parameters(router, seed)

    def fresh_router(self, seed: int = 0) -> Router:
        """Build the router with its own initialisation."""
        router = self.router_class(self.config, build_context(self.num_experts))
        init_weights(router, seed)
        return router

    def layer(
        self,
        *,
        seed: int = 0,
        capacity: Capacity | None = None,
        activation: str = "gelu",
        shared: FeedForward | None = None,
        **options: Any,
    ) -> MoELayer:
        """Build an MoE layer with the router."""
        bank = ExpertBank(D_MODEL, 8, self.num_experts, activation)
        init_weights(bank, seed)
        settings = LayerOptions(experts_per_token=self.experts_per_token, capacity=capacity or Capacity(), **options)
        return MoELayer(self.router(seed), bank, settings, shared=shared)


class ReplayRouter(Router):
    """Router that returns a given routing, so that experts can be checked in fp64 without a router's fp32."""

    def __init__(self, routing: AnyRouting) -> None:
        super().__init__(
            RouterConfig(name="replay"), RouterBuildContext(d_model=D_MODEL, num_experts=routing.num_experts)
        )
        self.routing = routing
        self.form = next(form for form, kind in ROUTING_OF_FORM.items() if type(routing) is kind)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> AnyRouting:
        return self.routing


def all_cases() -> list[Case]:
    """Return every router with its defaults and its other options, for each number of experts that it accepts."""
    cases = []
    for entry in ROUTERS.entries():
        choices = [{}, *OPTIONS.get(entry.name, [])]
        cases += [Case(entry.name, e, options) for options in choices for e in NUM_EXPERTS]
    # One expert: the defaults of routers with k=2 do not fit, k=1 does.
    cases += [Case("top_k", 1, {"top_k": 1}), Case("expert_choice", 1, {"average_experts": 1})]
    return list({str(case): case for case in cases if case.fits}.values())


def cases_of(num_experts: int = 8) -> list[Case]:
    """Return the cases with one number of experts."""
    return [case for case in all_cases() if case.num_experts == num_experts]


def list_cases(num_experts: int = 8) -> list[Case]:
    """Return the cases whose routing is a list of independent assignments; the only place that excludes others.

    Soft routing (test_soft.py) has no assignments that capacity could drop, and a single soft expert is not the dense
    network, because it computes means of tokens. In a chain (test_halting.py) no step can be dropped.
    """
    return [case for case in cases_of(num_experts) if not case.is_soft and not case.is_chain]


def default_cases() -> list[Case]:
    """Return every router with its defaults and 8 experts, or 16 if a token uses 8, so that some are unused."""
    cases = [Case(entry.name) for entry in ROUTERS.entries()]
    return [replace(case, num_experts=16) if case.always_uses_8_experts else case for case in cases]


MODES = {"train": True, "eval": False}


def build_context(num_experts: int, **data: Any) -> RouterBuildContext:
    """Return the build context of a router in a small language model; `data`: other values of its `DataSummary`."""
    count_V = (1000 / torch.arange(1, VOCAB + 1)).long()
    return RouterBuildContext(
        d_model=D_MODEL,
        num_experts=num_experts,
        data=replace(DataSummary(vocab_size=VOCAB, token_count_V=count_V, sequence_length=16, num_domains=3), **data),
        features={TokenPairs: torch.randint(100, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0))},
    )


def randomise_parameters(module: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter from N(0, 1/2), deterministically for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5**0.5, generator=generator)
    return module


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token vectors, token ids, and which tokens are valid."""

    x_TD: Tensor
    token_id_T: Tensor
    length: int
    valid_T: Tensor | None = None

    @classmethod
    def draw(cls, num_tokens: int, *, seed: int = 0, length: int | None = None, dtype: Any = torch.float32) -> "Tokens":
        """Draw tokens of unit variance."""
        generator = torch.Generator().manual_seed(1000 + seed)
        x_TD = torch.randn(num_tokens, D_MODEL, generator=generator).to(dtype)
        token_id_T = torch.randint(VOCAB, (num_tokens,), generator=generator)
        return cls(x_TD=x_TD, token_id_T=token_id_T, length=length or max(num_tokens, 1))

    def context(self, *, training: bool, seed: int = 0) -> RouteContext:
        """Return a context with a new generator."""
        return RouteContext(
            training=training,
            generator=torch.Generator().manual_seed(seed),
            sequence_length=self.length,
            token_id_T=self.token_id_T,
            valid_T=self.valid_T,
            domain_T=torch.zeros_like(self.token_id_T),
            features={TokenLabels: self.token_id_T % 5} | ({} if self.valid_T is None else {PaddingMask: self.valid_T}),
        )

    def take(self, index_T: Tensor, length: int | None = None) -> "Tokens":
        """Return the tokens at the given indices."""
        return replace(
            self,
            x_TD=self.x_TD[index_T],
            token_id_T=self.token_id_T[index_T],
            valid_T=None if self.valid_T is None else self.valid_T[index_T],
            length=length or self.length,
        )

    def with_other(self, index_T: Tensor, seed: int) -> "Tokens":
        """Return the tokens with those at `index_T` replaced by new draws."""
        other = Tokens.draw(len(self.x_TD), seed=seed)
        x_TD, token_id_T = self.x_TD.clone(), self.token_id_T.clone()
        x_TD[index_T], token_id_T[index_T] = other.x_TD[index_T], other.token_id_T[index_T]
        return replace(self, x_TD=x_TD, token_id_T=token_id_T)


def route(router: nn.Module, tokens: Tokens, *, training: bool, seed: int = 0) -> Any:
    """Run a router; return its routing."""
    router.train(training)
    return router(tokens.x_TD, tokens.context(training=training, seed=seed))


def run(layer: MoELayer, tokens: Tokens, *, training: bool, seed: int = 0) -> tuple[Tensor, Any]:
    """Run a layer; return its output and its LayerRecord."""
    layer.train(training)
    return layer(tokens.x_TD, tokens.context(training=training, seed=seed))


def merge_loop(bank: ExpertBank, x_TD: Tensor, routing: MergeRouting) -> Tensor:
    """Compute merged experts by a loop over tokens, each with its own sum of parameters: the reference of merging."""
    tokens = []
    for x_D, weight_E in zip(x_TD, routing.weight_TE.to(x_TD.dtype), strict=True):
        w_in_DF = sum(weight * w_DF for weight, w_DF in zip(weight_E, bank.w_in_EDF, strict=True))
        w_out_FD = sum(weight * w_FD for weight, w_FD in zip(weight_E, bank.w_out_EFD, strict=True))
        tokens.append(activate(x_D @ w_in_DF, bank.activation) @ w_out_FD)
    return torch.stack(tokens) if tokens else x_TD * 0


def slow_mixture(bank: Bank, x_TD: Tensor, routing: AnyRouting) -> Tensor:
    """Compute the output of the experts by a plain loop."""
    if isinstance(routing, MergeRouting):
        assert isinstance(bank, ExpertBank)
        return merge_loop(bank, x_TD, routing)
    if isinstance(routing, ChainRouting):
        return chain_loop(bank, x_TD, routing)
    return (slot_loop if isinstance(routing, SoftRouting) else double_loop)(bank, x_TD, routing)


def tabulate_weights(routing: AnyRouting) -> Tensor:
    """Return the weights as a table with one row per token, which determines the routing.

    Columns: experts, 0 where a token is not assigned; for soft routing the dispatch and combine weights of each slot.
    """
    if isinstance(routing, MergeRouting):
        return routing.weight_TE
    if isinstance(routing, SoftRouting):
        return routing.to_tokens(torch.cat([routing.dispatch_BLS, routing.combine_BLS], dim=-1))
    table_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=routing.weight_N.dtype)
    return table_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N)


def tabulate_assignments(routing: AnyRouting) -> Tensor:
    """Return the assignments as a table, bool [T, E]."""
    if isinstance(routing, MergeRouting):
        return routing.weight_TE > 0
    if isinstance(routing, SoftRouting):
        return routing.to_tokens(routing.combine_BLS).unflatten(-1, (routing.num_experts, -1)).sum(-1) > 0
    table_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    routing = routing.compact()
    table_TE[routing.token_N, routing.expert_N] = True
    return table_TE


def assert_same_gradients(fast: Tensor, slow: Tensor, leaves: Sequence[Tensor], *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)
    direction = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9)).to(fast.dtype)
    options = {"retain_graph": True, "allow_unused": True}
    if not fast.requires_grad or not slow.requires_grad:  # nothing was routed: the loop has no products
        assert not fast.any()
        return
    for leaf, ours, theirs in zip(
        leaves,
        torch.autograd.grad((fast * direction).sum(), leaves, **options),
        torch.autograd.grad((slow * direction).sum(), leaves, **options),
        strict=True,
    ):
        zeros = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zeros if ours is None else ours, zeros if theirs is None else theirs, rtol=rtol, atol=atol
        )
