"""What the contract tests run on: every registered router in every configuration that makes sense.

All products are run by `make test-all`. `make test` has to stay a few minutes while routers are added, so it runs a
part of each product, and the rest is marked slow. What is in that part is decided here and nowhere else:

- `thinned`, cases and values: a router with its defaults meets every value of every axis, and over the routers every
  pair of values meets; its other options meet one combination each, taking turns through all of them.
- `parametrize_sizes`, cases with all numbers of experts: the defaults at each number, other options at 8 and 1.
- `parametrize_pairs`, layouts and routers: every router on the plain layout, and every layout with one router of each
  family, the routers of a family taking turns. Routers of a family go through the same code of a layout.

Nothing is drawn by chance: the same registry gives the same selection.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.experts.activation import activate
from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.layout import LAYOUTS
from moebench.experts.reference import chain_loop, double_loop, slot_loop
from moebench.models.transformer import init_weights
from moebench.routing.context import RouteContext
from moebench.routing.losses import LOSSES
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Facts, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import AnyRouting, ChainRouting, LayerRecord

D_MODEL = 8
VOCAB = 50
NUM_EXPERTS = (1, 2, 8, 9)
NUM_TOKENS = (0, 1, 7, 64)

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "top_k": [
        {"softmax": "after"},
        {"renormalise": False},
        {"top_k": 1, "renormalise": False},
        {"top_k": 8, "renormalise": False},
    ],
    "switch": [{"jitter": 0.0}, {"exploration": "input_dropout"}, {"exploration": "sample"}],
    "gshard": [
        *({"second_expert": policy} for policy in ("all", "sampling", "none")),
        {"second_expert": "threshold", "threshold": 0.05},
    ],
    "deepseek_moe": [{"top_k": 2, "num_groups": 4, "kept_groups": 2, "scale": 16.0}],
    "v_moe": [{"top_k": 1, "priority": "position"}, {"priority": "sum", "priority_train": "best", "noise": 0.0}],
    "x_moe": [{"top_k": 2}],
    "remoe": [{"top_k": 1}],
    "dense_to_sparse": [{"dense_steps": 0}, {"weights": "softmax", "hard_phase": "argmax"}],
    "mlp_top_k": [{"activation": "relu", "dropout": 0.0, "bias": False}],
    "sparse_mixer": [{"top_k": 1, "tolerance": 0.5}],
    "quantile_balancing": [{"renormalise": True}],
    "dselect_k": [{"top_k": 1}],
    "sigma_moe": [{"top_k": 1, "left_out": 0.5}],
    "noisy_top_k": [{"top_k": 3}],
    "loss_free": [{"top_k": 1, "score": "softmax", "update": "proportional"}],
    "deepseek_v3": [{"top_k": 2, "num_groups": 4, "kept_groups": 2}],
    "expert_choice": [{"group": "sequence"}, {"average_experts": 1}, {"max_per_token": 3}],
    "two_sided": [{"group": "sequence", "shortlist": 2}],
    "random": [{"top_k": 2}],
    "reinforce": [{"baseline": "learned"}, {"baseline": "none"}],
    "routing_networks": [{"agents": "single", "pass_through": True, "collaboration": 0.1, "detach_input": False}],
    "routing_networks_wpl": [{"agents": "single", "pass_through": True, "collaboration": 0.1}],
    "conditional_computation": [{"average_experts": 1, "evaluation": "likely"}, {"baseline": "learned"}],
    "thor": [{"training": "sequence", "evaluation": "sequence"}, {"training": "token", "evaluation": "average"}],
    "stable_moe": [{"stage_1_steps": 0}],
    "hash": [{"table": "random"}, {"table": "clustered"}],
    "multi_gate": [{"top_k": 2}],
    "top_p": [{"top_p": 1.0, "expected_experts": 8}],
    "base": [{"solver": "auction"}, {"solver": "exact"}],
    "sinkhorn": [{"top_k": 3}],
    "mixture_of_depths": [{"share": 0.25, "predictor_width": 4}],
    "moe_plus_plus": [{"top_k": 1}],
    "autonomy_of_experts": [{"renormalise": False}],
    "act": [{"epsilon": 0.3}],
    "ponder_net": [{"prior": 0.5}],
    "soft_moe": [{"slots_per_expert": 1}, {"average_experts": 2}],
    "mixture_of_tokens": [{"group_size": 2, "temperature": 0.5}],
    "smear": [{"expert_dropout": 0.0}, {"expert_dropout": 0.6}],
    "lory": [{"segment_length": 3}],
    "domain_posterior": [{"prior": "even"}],
    "limoe": [{"top_k": 2, "least_experts": 4}],
}
"""Options beside the defaults. A router that is not here (a plugin's) is tested with its defaults."""


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
        """Whether a token uses 8 experts however many there are."""
        return self.experts_per_token == replace(self, num_experts=16).experts_per_token == 8

    @property
    def fits(self) -> bool:
        """Whether the router accepts these options with so many experts."""
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
        """Whether the experts are steps one behind another."""
        return self.router_class.form.is_chain

    @property
    def experts_per_token(self) -> int:
        return self.router_class.experts_per_token(self.config, self.num_experts)

    def router(self, seed: int = 0) -> Router:
        """Build the router with every parameter drawn from N(0, 1/2): no ties, whatever its own initialisation."""
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
        """Build a whole MoE layer around the router."""
        bank = ExpertBank(D_MODEL, 8, self.num_experts, activation)
        init_weights(bank, seed)
        settings = LayerOptions(experts_per_token=self.experts_per_token, capacity=capacity or Capacity(), **options)
        return MoELayer(self.router(seed), bank, settings, shared=shared)


class ReplayRouter(Router):
    """Returns a given routing, so that the experts can be checked in fp64 apart from the fp32 of the routers."""

    def __init__(self, routing: AnyRouting) -> None:
        super().__init__(
            RouterConfig(name="replayed"), RouterBuildContext(d_model=D_MODEL, num_experts=routing.num_experts)
        )
        self.routing = routing

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
    """Return the cases whose routing is a list of assignments, each on its own: the one place that leaves out others.

    Soft routing has no weight of a token for an expert, no assignment that capacity could take, and one soft expert is
    not the dense network (it computes means of tokens): test_soft.py. In a chain of experts no step can be left out:
    test_halting.py.
    """
    return [case for case in cases_of(num_experts) if not case.is_soft and not case.is_chain]


def default_cases() -> list[Case]:
    """Return every router once, with its defaults and 8 experts, or 16 where a token uses 8: some must be left."""
    cases = [Case(entry.name) for entry in ROUTERS.entries()]
    return [replace(case, num_experts=16) if case.always_uses_8_experts else case for case in cases]


PLAIN_LAYOUT = "every_n"
MODES = {"train": True, "eval": False}


def parametrize_cases(cases: Sequence[Case], **axes: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrise a test by `case` and axes (values, or id -> value); what `make test` leaves out is slow."""
    named = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()]
    ids = [list(values) for values in named]
    combinations = list(itertools.product(*ids))
    kept: set[Hashable] = set()
    plain, other = itertools.count(), itertools.count()
    for case in cases:
        if case.options:
            kept.add((str(case), *combinations[next(other) % len(combinations)]))
            continue
        shift = next(plain)  # along the first axis, so that over the cases it meets every value of the others
        for turn in range(max(map(len, ids))):
            chosen = (values[(turn + shift * (not axis)) % len(values)] for axis, values in enumerate(ids))
            kept.add((str(case), *chosen))
    full = {
        (str(case), *chosen): (case, *(values[name] for values, name in zip(named, chosen, strict=True)))
        for case in cases
        for chosen in combinations
    }
    return _parametrised(("case", *axes), full, kept)


def parametrize_sizes() -> pytest.MarkDecorator:
    """Parametrise a test by every case with every number of experts."""
    cases = {(str(case),): (case,) for case in all_cases()}
    kept = [key for key, (case,) in cases.items() if not case.options or case.num_experts in (1, 8)]
    return _parametrised(("case",), cases, kept)


def parametrize_pairs(
    refused: Callable[[str, str], Any] = lambda layout, router: False, *, each_family: bool = True
) -> pytest.MarkDecorator:
    """Parametrise a test by `layout` and `router`; pairs that are refused stand in for a family only if all are.

    Without `each_family` all routers take turns: for what treats a router as a name and its options.
    """
    families: dict[str, list[str]] = {}
    for entry in ROUTERS.entries():
        families.setdefault(entry.facts.family if each_family else "", []).append(entry.name)
    kept = {(PLAIN_LAYOUT, router) for router in ROUTERS.names()}
    for turn, layout in enumerate(LAYOUTS.names()):
        for routers in families.values():
            able = [router for router in routers if not refused(layout, router)] or routers
            kept.add((layout, able[turn % len(able)]))
    pairs = {pair: pair for pair in itertools.product(LAYOUTS.names(), ROUTERS.names())}
    return _parametrised(("layout", "router"), pairs, kept)


def _parametrised(
    names: Sequence[str], full: Mapping[tuple[str, ...], tuple[Any, ...]], kept: Iterable[Hashable]
) -> pytest.MarkDecorator:
    kept = set(kept)
    assert kept <= full.keys()
    marks = {key: () if key in kept else pytest.mark.slow for key in full}
    return pytest.mark.parametrize(
        names, [pytest.param(*values, id="-".join(key), marks=marks[key]) for key, values in full.items()]
    )


@contextmanager
def note_in_failure(**what: Any) -> Iterator[None]:
    """Say in a failure which of the values that a test goes through it was."""
    try:
        yield
    except BaseException as error:
        error.add_note("with " + ", ".join(f"{name}={value}" for name, value in what.items()))
        raise


def build_context(num_experts: int) -> RouterBuildContext:
    """Return the place of a router in a small language model: frequent and rare ids."""
    count_V = (1000 / torch.arange(1, VOCAB + 1)).long()
    return RouterBuildContext(
        d_model=D_MODEL,
        num_experts=num_experts,
        vocab_size=VOCAB,
        token_count_V=count_V,
        token_pairs=lambda: torch.randint(100, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0)),
        sequence_length=16,
        num_domains=3,
    )


def randomise_parameters(module: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter from N(0, 1/2), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5**0.5, generator=generator)
    return module


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Some tokens: vectors, ids, and which are padding."""

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
            label_T=self.token_id_T % 5,
        )

    def take(self, index_T: Tensor, length: int | None = None) -> "Tokens":
        """Return some of the tokens, in the order of the index."""
        return replace(
            self,
            x_TD=self.x_TD[index_T],
            token_id_T=self.token_id_T[index_T],
            valid_T=None if self.valid_T is None else self.valid_T[index_T],
            length=length or self.length,
        )

    def with_other(self, index_T: Tensor, seed: int) -> "Tokens":
        """Return the tokens with those at `index_T` replaced by others."""
        other = Tokens.draw(len(self.x_TD), seed=seed)
        x_TD, token_id_T = self.x_TD.clone(), self.token_id_T.clone()
        x_TD[index_T], token_id_T[index_T] = other.x_TD[index_T], other.token_id_T[index_T]
        return replace(self, x_TD=x_TD, token_id_T=token_id_T)


def route(router: nn.Module, tokens: Tokens, *, training: bool, seed: int = 0) -> Any:
    """Run a router alone; returns its Routing or SoftRouting."""
    router.train(training)
    return router(tokens.x_TD, tokens.context(training=training, seed=seed))


def run(layer: MoELayer, tokens: Tokens, *, training: bool, seed: int = 0) -> tuple[Tensor, Any]:
    """Run a whole layer; returns its output and its LayerRecord."""
    layer.train(training)
    return layer(tokens.x_TD, tokens.context(training=training, seed=seed))


def merge_loop(bank: ExpertBank, x_TD: Tensor, routing: MergeRouting) -> Tensor:
    """Return each token through a network whose parameters are summed for it alone: the oracle of merging."""
    tokens = []
    for x_D, weight_E in zip(x_TD, routing.weight_TE.to(x_TD.dtype), strict=True):
        w_in_DF = sum(weight * w_DF for weight, w_DF in zip(weight_E, bank.w_in_EDF, strict=True))
        w_out_FD = sum(weight * w_FD for weight, w_FD in zip(weight_E, bank.w_out_EFD, strict=True))
        tokens.append(activate(x_D @ w_in_DF, bank.activation) @ w_out_FD)
    return torch.stack(tokens) if tokens else x_TD * 0


def slow_mixture(bank: Bank, x_TD: Tensor, routing: AnyRouting) -> Tensor:
    """Return what the experts give by a plain loop."""
    if isinstance(routing, MergeRouting):
        assert isinstance(bank, ExpertBank)
        return merge_loop(bank, x_TD, routing)
    if isinstance(routing, ChainRouting):
        return chain_loop(bank, x_TD, routing)
    return (slot_loop if isinstance(routing, SoftRouting) else double_loop)(bank, x_TD, routing)


def compute_raw_losses(router: Router, record: LayerRecord) -> dict[str, Tensor]:
    """Return every loss that the router has a coefficient for or brings itself."""
    own = router.losses(record)
    return own | {name: LOSSES.get(name).item(record) for name in router.config.losses if name not in own}


def is_taught(case: Case, name: str) -> bool:
    """Return whether a parameter learns from the router's own losses or objective alone."""
    return any(name == part or name.startswith(f"{part}.") for part in case.facts.trained_by_own_loss)


def tabulate_weights(routing: AnyRouting) -> Tensor:
    """Return the weights as one row per token: two routings with equal tables are the same.

    A column for each expert, 0 where a token does not go; of soft routing two columns for each slot, in and out.
    """
    if isinstance(routing, MergeRouting):
        return routing.weight_TE
    if isinstance(routing, SoftRouting):
        return routing.to_tokens(torch.cat([routing.dispatch_BLS, routing.combine_BLS], dim=-1))
    table_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=routing.weight_N.dtype)
    return table_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N)


def tabulate_assignments(routing: AnyRouting) -> Tensor:
    """Return who goes where as a table of bools."""
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
    pull = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9)).to(fast.dtype)
    options = {"retain_graph": True, "allow_unused": True}
    if not fast.requires_grad or not slow.requires_grad:  # nothing was routed: the loop made no product at all
        assert not fast.any()
        return
    for leaf, ours, theirs in zip(
        leaves,
        torch.autograd.grad((fast * pull).sum(), leaves, **options),
        torch.autograd.grad((slow * pull).sum(), leaves, **options),
        strict=True,
    ):
        zeros = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zeros if ours is None else ours, zeros if theirs is None else theirs, rtol=rtol, atol=atol
        )
