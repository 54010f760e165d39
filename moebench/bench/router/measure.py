"""The router benchmark: the cost of each router alone against plain softmax top-k in the same rounds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebench.bench.machine import choose_device, prepare_machine
from moebench.bench.timing import Protocol, Spread, TimedCall, Timings
from moebench.errors import UsageError
from moebench.models.transformer import BatchContext, init_weights
from moebench.routing.assignment import solve_balanced_assignment
from moebench.routing.context import DataSummary
from moebench.routing.contract import build_router, check_routing
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.layer_losses import compute_raw_losses
from moebench.routing.layer_name import LayerName
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import AnyRouting, LayerRecord, Routing
from moebench.seeds import make_generator

D_MODEL, SEQUENCE, VOCAB, DOMAINS = 64, 256, 1000, 8
TOP_K_COST = "T·E"
"""Growth of a plain top-k; routers of this cost share one goal."""
TOP_K_COST_GOAL = 3.0
GOALS = {"sinkhorn": 8.0, "base": 30.0}
"""Largest acceptable ratio to top-k's time, forward and backward; routers of other costs have no goal."""
VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {"base": ({}, {"solver": "auction"}, {"solver": "exact"})}
"""Options that get their own row."""
EXACT_TOKENS = 2048
"""Maximum number of tokens for the exact assignment, whose time grows with their cube."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

    routers: Sequence[str] = ()
    """Empty: all."""
    tokens: Sequence[int] = (2048, 8192)
    experts: Sequence[int] = (8, 64)
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield tokens and experts of every table; raise UsageError for tokens that are not whole sequences."""
        for num_tokens in self.tokens:
            if num_tokens > SEQUENCE and num_tokens % SEQUENCE:
                raise UsageError(f"--tokens must be at most {SEQUENCE} or a multiple of it, got {num_tokens}")
            yield from ((num_tokens, num_experts) for num_experts in self.experts)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A router with its options and a number of experts."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_experts: int

    @property
    def label(self) -> str:
        """Name of its row."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def router_class(self) -> type[Router]:
        """The registered class."""
        return ROUTERS.get(self.name, where="--router").item

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.router_class.Config(**self.options)

    @property
    def top_k(self) -> int:
        """Experts per token; the mean where it varies."""
        return self.router_class.experts_per_token(self.config, self.num_experts)

    @property
    def cost(self) -> str:
        """Growth of the time with T, E and K."""
        return ROUTERS.get(self.name).facts.cost

    @property
    def goal(self) -> float | None:
        """Largest acceptable ratio to top-k's time; None without a goal."""
        return GOALS.get(self.name, TOP_K_COST_GOAL if self.cost == TOP_K_COST else None)

    def find_skip_reason(self, num_tokens: int) -> str | None:
        """Return why it is not measured; None if it is."""
        if self.options.get("solver") == "exact" and num_tokens > EXACT_TOKENS:
            return f"solved for at most {EXACT_TOKENS} tokens"
        try:
            self.router_class.check(self.config, self.num_experts)
        except UsageError as error:
            return str(error)
        return None

    def reference(self) -> "Subject":
        """Return plain softmax top-k with the same number of experts per token."""
        options = {"top_k": self.top_k} | ({"renormalise": False} if self.top_k == 1 else {})
        return Subject(name="top_k", options=options, num_experts=self.num_experts)


@dataclass(frozen=True, kw_only=True)
class RouterResult:
    """A measured router; ratios are to top-k with as many experts per token in the same round."""

    name: str
    top_k: int
    cost: str
    goal: float | None
    forward_ms: float
    train_ms: float
    """Forward and backward of the weights and the router's losses, with gradients of the tokens and the router."""
    forward: Spread
    train: Spread
    share_of_optimum: float | None = None
    """Gain of its assignment over a random balanced one, as a share of the gain of the best one."""

    @property
    def reaches_goal(self) -> bool | None:
        """Whether it is within its goal; None without one."""
        return None if self.goal is None else self.train.median <= self.goal


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """All routers at one number of tokens and experts."""

    num_tokens: int
    num_experts: int
    lines: tuple[RouterResult, ...]
    skipped: Mapping[str, str]
    """Row -> why it was not measured."""
    forward_rounds: Timings
    train_rounds: Timings

    @property
    def is_busy(self) -> bool:
        """Whether other processes used the machine in rounds that count."""
        return self.forward_rounds.num_contended > 0 or self.train_rounds.num_contended > 0


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All tables and the machine that they were measured on."""

    tables: tuple[SizeResult, ...]
    machine: dict[str, Any]
    settings: Settings


def measure(settings: Settings, report_progress: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure every table; call `report_progress` with a line before each."""
    device = choose_device(settings.device)
    names = [ROUTERS.get(name, where="--router").name for name in settings.routers or ROUTERS.names()]
    sizes = list(settings.sizes())
    machine = prepare_machine(threads=settings.threads, allocator="keep", device=device)
    protocol = Protocol(rounds=settings.rounds, device=device)
    tables = []
    for number, (num_tokens, num_experts) in enumerate(sizes, start=1):
        report_progress(f"[{number}/{len(sizes)}] {len(names)} routers, T{num_tokens} E{num_experts}")
        tables.append(_measure_size(names, num_tokens, num_experts, settings.seed, protocol))
    return Benchmark(tables=tuple(tables), machine=machine, settings=settings)


def _measure_size(names: Sequence[str], num_tokens: int, num_experts: int, seed: int, protocol: Protocol) -> SizeResult:
    subjects = [
        Subject(name=name, options=options, num_experts=num_experts)
        for name in names
        for options in VARIANTS.get(name, ({},))
    ]
    skipped = {subject.label: reason for subject in subjects if (reason := subject.find_skip_reason(num_tokens))}
    subjects = [subject for subject in subjects if subject.label not in skipped]
    timed = {router.label: router for subject in subjects for router in (subject.reference(), subject)}
    calls = {label: RouterCall(subject, num_tokens, seed, protocol.device) for label, subject in timed.items()}
    forward = protocol.measure({label: TimedCall(call=call.forward) for label, call in calls.items()})
    train = protocol.measure({label: TimedCall(call=call.train, prepare=call.clear) for label, call in calls.items()})
    lines = [
        RouterResult(
            name=subject.label,
            top_k=subject.top_k,
            cost=subject.cost,
            goal=subject.goal,
            forward_ms=forward.median_ms(subject.label),
            train_ms=train.median_ms(subject.label),
            forward=forward.ratio(subject.label, subject.reference().label),
            train=train.ratio(subject.label, subject.reference().label),
            share_of_optimum=calls[subject.label].measure_optimality() if subject.name == "base" else None,
        )
        for subject in subjects
    ]
    return SizeResult(
        num_tokens=num_tokens,
        num_experts=num_experts,
        lines=tuple(lines),
        skipped=skipped,
        forward_rounds=forward,
        train_rounds=train,
    )


class RouterCall:
    """One router on random tokens, ready to be timed in training mode."""

    def __init__(self, subject: Subject, num_tokens: int, seed: int, device: torch.device) -> None:
        self.length = min(SEQUENCE, num_tokens)
        self.seed = seed
        draw = make_generator(seed, "bench router", num_tokens)
        self.x_TD = torch.randn(num_tokens, D_MODEL, generator=draw).to(device).requires_grad_()
        shape = (max(num_tokens // self.length, 1), self.length)
        self.token_id_BL = torch.randint(VOCAB, shape, generator=draw).to(device)
        self.domain_B = (torch.arange(shape[0]) % DOMAINS).to(device)
        context = RouterBuildContext(
            d_model=D_MODEL,
            num_experts=subject.num_experts,
            data=DataSummary(
                vocab_size=VOCAB,
                token_count_V=self.token_id_BL.flatten().cpu().bincount(minlength=VOCAB),
                sequence_length=self.length,
                num_domains=DOMAINS,
            ),
        )
        self.router: Router = build_router(subject.router_class, subject.config, context)
        init_weights(self.router, seed)
        self.router.to(device).train()
        self.coefficients: dict[str, float] = subject.config.losses

    def record(self) -> LayerRecord:
        """Route the tokens."""
        ctx = BatchContext(
            training=True,
            seed=self.seed,
            token_id_BL=self.token_id_BL,
            domain_B=self.domain_B,
            features={TokenLabels: self.token_id_BL.flatten()},
        )
        ctx_of_layer = ctx.route(LayerName(), self.length, self.x_TD.device)
        routing = check_routing(self.router, self.router(self.x_TD, ctx_of_layer))
        return LayerRecord(routing=routing, kept=routing, sequence_length=self.length)

    def losses(self, record: LayerRecord) -> list[Tensor]:
        """Return the weighted auxiliary losses of training."""
        raw = compute_raw_losses(self.router, record, self.coefficients)
        return [self.coefficients[name] * value for name, value in raw.items()]

    @torch.no_grad()
    def forward(self) -> object:
        """Route and compute the losses, without gradients."""
        return self.losses(self.record())

    def train(self) -> None:
        """Route, compute the losses and differentiate them and the weights."""
        record = self.record()
        differentiable = [value for value in [*_weights(record.routing), *self.losses(record)] if value.requires_grad]
        if differentiable:  # empty for static routers
            torch.autograd.backward(differentiable, [torch.ones_like(value) for value in differentiable])

    def clear(self) -> None:
        """Clear the gradients."""
        self.x_TD.grad = None
        self.router.zero_grad(set_to_none=True)

    @torch.no_grad()
    def measure_optimality(self) -> float | None:
        """Return the gain of the top-1 assignment over that of the best balanced one; None for too many tokens."""
        routing = self.record().routing
        if not isinstance(routing, Routing) or routing.logits_TE is None or routing.num_tokens > EXACT_TOKENS:
            return None
        affinity_TE = routing.logits_TE.double()
        random = affinity_TE.mean(1).sum()

        def gain(expert_T: Tensor) -> float:
            return float(affinity_TE.gather(1, expert_T.view(-1, 1)).sum() - random)

        return gain(routing.expert_N) / gain(solve_balanced_assignment(affinity_TE, "exact"))


def _weights(routing: AnyRouting) -> list[Tensor]:
    """Return the weights of the experts' outputs, of tokens in slots, or of merged parameters."""
    if isinstance(routing, SoftRouting):
        return [routing.dispatch_BLS, routing.combine_BLS]
    return [routing.weight_GE if isinstance(routing, MergeRouting) else routing.weight_N]
