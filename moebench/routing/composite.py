"""Groups of experts, each with its own router, combined into one flat routing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.contract import build_router
from moebench.routing.level import Level
from moebench.routing.logit_router import LogitRouter
from moebench.routing.reduction import LossValue, average_losses
from moebench.routing.router import Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import LayerRecord, Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedRouting(Routing):
    """A flat routing that keeps the routing of each router, which their own losses and objectives need."""

    parts: tuple[Routing, ...] = ()
    """Routing of each group over its experts, for the tokens that were sent there."""
    picked_TG: Tensor | None = None
    """bool: tokens that were sent to each group; None: all tokens to every group."""
    outer: Routing | None = None
    """Routing over the groups, where a router picks them."""

    @override
    def slice_tokens(self, start: int, num_tokens: int) -> "GroupedRouting":
        routing = super().slice_tokens(start, num_tokens)
        assert isinstance(routing, GroupedRouting)
        return replace(
            routing,
            parts=tuple(part.slice_tokens(start, num_tokens) for part in self.parts),
            picked_TG=None if self.picked_TG is None else self.picked_TG[start : start + num_tokens],
            outer=None if self.outer is None else self.outer.slice_tokens(start, num_tokens),
        )


class GroupedRouter(LogitRouter):
    """G parallel routers of one class; with `pick_groups`, one above them picks groups for each token.

    Without it, every token is routed in every group and the outputs add up: the k top-1 prototypes of M6-T
    (arXiv:2105.15082). With it, w_ge = w_g · w_e|g: the two levels of Shazeer et al. 2017 (arXiv:1701.06538,
    appendix B). The router of a group treats tokens that went elsewhere as padding. Scores are products (joint
    probabilities if both levels are probabilities), logits sums. A router that is a fixed function of the token is that
    function over all experts on two levels, and a different one in each parallel group (`Level`). A loss that the
    algorithm defines is the mean over all routers; every other loss is computed on the flat routing.
    """

    def __init__(
        self,
        router_class: type[Router],
        config: RouterConfig,
        context: RouterBuildContext,
        groups: int,
        *,
        pick_groups: bool,
    ) -> None:
        super().__init__(config, context)
        self.group_size = context.num_experts // groups
        self.inner_k = router_class.experts_per_token(config, self.group_size)
        above = replace(context, num_experts=groups, level=Level(num_below=self.group_size))
        self.outer = build_router(router_class, config, above) if pick_groups else None
        levels = [Level(num_above=groups) if pick_groups else Level(group=group) for group in range(groups)]
        contexts = [replace(context, num_experts=self.group_size, level=level) for level in levels]
        self.inner = nn.ModuleList(build_router(router_class, config, below) for below in contexts)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        return self._join(lambda router, ctx: router(x_TD, ctx), ctx)

    @override
    def score_tokens(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        return torch.cat([router.score_tokens(x_TD, ctx) for router in self._logit_routers], dim=1)

    @property
    @override
    def needs_logits_only(self) -> bool:
        routers = self._logit_routers
        return len(routers) == len(self._all_routers) and all(router.needs_logits_only for router in routers)

    @override
    def assign(self, logits_TE: Tensor, ctx: RouteContext) -> Routing:
        routers = self._logit_routers
        parts = torch.split(logits_TE, [router.num_experts for router in routers], dim=1)
        assign_of: dict[Router, Callable[[RouteContext], Any]] = {
            router: partial(router.assign, part) for router, part in zip(routers, parts, strict=True)
        }
        return self._join(lambda router, ctx: assign_of[router](ctx), ctx)

    def _join(self, route: Callable[[Router, RouteContext], Any], ctx: RouteContext) -> Routing:
        """Return the flat routing from those of all routers, each of which `route` computes."""
        if self.outer is None:
            return join_groups([route(router, ctx) for router in self._routers], self.group_size)
        outer = route(self.outer, ctx)
        if ctx.valid_T is not None:
            outer = outer.keep(ctx.valid_T[outer.token_N])
        picked_TG, weight_TG = _table(outer)
        parts = []
        for group, router in enumerate(self._routers):
            here_T = picked_TG[:, group]
            part = route(router, replace(ctx, valid_T=here_T))
            parts.append(part.keep(here_T[part.token_N]))
        flat = join_groups(parts, self.group_size)
        flat = replace(flat, outer=outer, picked_TG=picked_TG)
        weight_N = flat.weight_N * weight_TG[flat.token_N, flat.expert_N // self.group_size]
        scores_TE, logits_TE = self._joint(outer, flat)
        return replace(flat, weight_N=weight_N, scores_TE=scores_TE, logits_TE=logits_TE)

    def _joint(self, outer: Routing, flat: Routing) -> tuple[Tensor | None, Tensor | None]:
        def spread(value_TG: Tensor) -> Tensor:
            return value_TG.repeat_interleave(self.group_size, dim=-1)

        scores = logits = None
        if flat.scores_TE is not None and outer.scores_TE is not None:
            scores = spread(outer.scores_TE) * flat.scores_TE
        if flat.logits_TE is not None and outer.logits_TE is not None:
            logits = spread(outer.logits_TE) + flat.logits_TE
        return scores, logits

    @property
    @override
    def traits(self) -> RouterTraits:
        traits = [router.traits for router in self._routers]
        return RouterTraits(
            needs_whole_batch=any(each.needs_whole_batch for each in traits),
            has_variable_k=any(each.has_variable_k for each in traits),
            has_state=any(each.has_state for each in traits),
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        per_router = [router.losses(part) for router, part in self._records(record)]
        return {name: average_losses([losses[name] for losses in per_router]) for name in per_router[0]}

    @override
    def objective(self, record: LayerRecord) -> Tensor | None:
        # Summed over routers, each for its tokens: log-probabilities of a joint choice add up.
        objectives = [(router.objective(part), part.valid_T) for router, part in self._records(record)]
        learned = [
            loss_T if valid_T is None else loss_T.where(valid_T, 0.0)
            for loss_T, valid_T in objectives
            if loss_T is not None
        ]
        return torch.stack(learned).sum(0) if learned else None

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        # Named by the index of the router; the router above comes last.
        numbered = enumerate(self._records(record))
        return {
            f"{n}.{name}": value for n, (router, part) in numbered for name, value in router.statistics(part).items()
        }

    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        def statistics_of(number: int) -> dict[str, Tensor]:
            prefix = f"{number}."
            return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}

        load_GE = load_E.view(-1, self.group_size)
        for number, (router, load) in enumerate(zip(self._routers, load_GE, strict=True)):
            router.after_step(load, statistics_of(number))
        if self.outer is not None:
            # Each token of a group is counted by k of its experts.
            self.outer.after_step(load_GE.sum(-1) // self.inner_k, statistics_of(len(load_GE)))

    @override
    def rows_per_token(self, experts_per_token: int) -> float:
        inner = [router.rows_per_token(self.inner_k) for router in self._routers]
        if self.outer is None:
            return sum(inner)
        return self.outer.rows_per_token(experts_per_token // self.inner_k) * sum(inner) / len(inner)

    @override
    def flops_per_token(self) -> int:
        # The router of every group reads every token.
        above = 0 if self.outer is None else self.outer.flops_per_token()
        return above + sum(router.flops_per_token() for router in self._routers)

    @override
    def executed_flops(self, record: LayerRecord) -> Tensor:
        # Routers of groups read tokens of other groups too.
        parts = [(router, replace(part, valid_T=record.valid_T)) for router, part in self._records(record)]
        return torch.stack([router.executed_flops(part) for router, part in parts]).sum()

    @property
    def _all_routers(self) -> list[Router]:
        return self._routers if self.outer is None else [*self._routers, self.outer]

    @property
    def _logit_routers(self) -> list[LogitRouter]:
        return [router for router in self._all_routers if isinstance(router, LogitRouter)]

    @property
    def _routers(self) -> list[Router]:
        return [router for router in self.inner if isinstance(router, Router)]

    def _records(self, record: LayerRecord) -> list[tuple[Router, LayerRecord]]:
        """Return each router with the record of its part, without padding."""
        routing = record.routing
        assert isinstance(routing, GroupedRouting)
        records = []
        for group, (router, part) in enumerate(zip(self._routers, routing.parts, strict=True)):
            valid_T = record.valid_T if routing.picked_TG is None else routing.picked_TG[:, group]
            records.append((router, _record(record, part, valid_T)))
        if self.outer is not None and routing.outer is not None:
            records.append((self.outer, _record(record, routing.outer, record.valid_T)))
        return records


def _record(record: LayerRecord, part: Routing, valid_T: Tensor | None) -> LayerRecord:
    part = part if valid_T is None else part.keep(valid_T[part.token_N])
    return replace(record, routing=part, kept=part, valid_T=valid_T)


def join_groups(parts: Sequence[Routing], group_size: int) -> GroupedRouting:
    """Join the routings of parallel groups: experts are numbered group by group."""
    num_tokens = parts[0].num_tokens
    is_rectangle = all(part.top_k is not None for part in parts)

    def join(values: Sequence[Tensor]) -> Tensor:
        if not is_rectangle:
            return torch.cat(list(values))
        tables = [value.view(num_tokens, part.top_k or 0) for value, part in zip(values, parts, strict=True)]
        return torch.cat(tables, dim=1).reshape(-1)

    priorities = [part.priority_N for part in parts if part.priority_N is not None]
    logits = [part.logits_TE for part in parts if part.logits_TE is not None]
    scores = [part.scores_TE for part in parts if part.scores_TE is not None]
    kept = [part.counted_N for part in parts]
    chosen = [part.choices_N for part in parts]
    return GroupedRouting(
        token_N=join([part.token_N for part in parts]),
        expert_N=join([part.expert_N + group * group_size for group, part in enumerate(parts)]),
        weight_N=join([part.weight_N for part in parts]),
        num_tokens=num_tokens,
        num_experts=group_size * len(parts),
        logits_TE=torch.cat(logits, dim=-1) if len(logits) == len(parts) else None,
        scores_TE=torch.cat(scores, dim=-1) if len(scores) == len(parts) else None,
        priority_N=join(priorities) if len(priorities) == len(parts) else None,
        top_k=sum(part.top_k or 0 for part in parts) if is_rectangle else None,
        kept_N=None if all(part.kept_N is None for part in parts) else join(kept),
        chosen_N=None if all(part.chosen_N is None for part in parts) else join(chosen),
        parts=tuple(parts),
    )


def _table(outer: Routing) -> tuple[Tensor, Tensor]:
    """Return picked_TG (bool) and weight_TG of a routing."""
    shape = outer.num_tokens, outer.num_experts
    kept_N = torch.ones_like(outer.token_N, dtype=torch.bool) if outer.kept_N is None else outer.kept_N
    index_N = outer.token_N, outer.expert_N
    picked_TG = torch.zeros(shape, dtype=torch.bool, device=kept_N.device).index_put(index_N, kept_N)
    return picked_TG, outer.weight_N.new_zeros(shape).index_put(index_N, outer.weight_N)
