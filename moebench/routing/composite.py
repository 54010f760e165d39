"""Routers made of routers: groups of experts, each with a router of its own, behind one flat routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebench.routing.context import RouteContext
from moebench.routing.level import Level
from moebench.routing.router import Router, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedRouting(Routing):
    """A flat routing that remembers what each router said: their own losses and objectives need it."""

    parts: tuple[Routing, ...] = ()
    """One for each group, over its own experts; of the tokens that were sent there."""
    picked_TG: Tensor | None = None
    """bool: which tokens were sent to which group; None: all tokens to every group."""
    outer: Routing | None = None
    """Over the groups, where a router picks them."""

    def slice_tokens(self, start: int, num_tokens: int) -> "GroupedRouting":
        """Return the part that concerns some tokens, with that of what each router said."""
        own = super().slice_tokens(start, num_tokens)
        assert isinstance(own, GroupedRouting)
        return replace(
            own,
            parts=tuple(part.slice_tokens(start, num_tokens) for part in self.parts),
            picked_TG=None if self.picked_TG is None else self.picked_TG[start : start + num_tokens],
            outer=None if self.outer is None else self.outer.slice_tokens(start, num_tokens),
        )


class GroupedRouter(Router):
    """G routers of one kind side by side, and with `pick_groups` one above them that picks groups for each token.

    Without: every token is routed in every group and the outputs add up - k top-1 prototypes of M6-T
    (arXiv:2105.15082). With: w_ge = w_g · w_e|g, the two levels of Shazeer et al. 2017
    (arXiv:1701.06538, appendix B). For the router of a group, the tokens that went elsewhere are padding. Scores are
    products (joint probabilities where both levels are), logits sums. A router that is a fixed function of the token
    is that function over all experts on two levels, and another one in every group without (`Level`). A loss that the
    algorithm brings itself is the mean over all routers, every other loss is one over the flat routing.
    """

    def __init__(
        self, router_class: type[Router], config: Any, context: RouterBuildContext, groups: int, *, pick_groups: bool
    ) -> None:
        super().__init__(config, context)
        self.group_size = context.num_experts // groups
        self.inner_k = router_class.experts_per_token(config, self.group_size)
        above = replace(context, num_experts=groups, level=Level(num_below=self.group_size))
        self.outer = router_class(config, above) if pick_groups else None
        levels = [Level(num_above=groups) if pick_groups else Level(group=group) for group in range(groups)]
        sites = [replace(context, num_experts=self.group_size, level=level) for level in levels]
        self.inner = nn.ModuleList(router_class(config, below) for below in sites)
        self.consistency = self._routers[0].consistency

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Ask the router above, then the router of each group, and put their answers side by side."""
        if self.outer is None:
            return joined([router(x_TD, ctx) for router in self._routers], self.group_size)
        outer = self.outer(x_TD, ctx)
        if ctx.valid_T is not None:
            outer = outer.keep(ctx.valid_T[outer.token_N])
        picked_TG, weight_TG = _table(outer)
        parts = []
        present_T = torch.ones_like(picked_TG[:, 0]) if ctx.valid_T is None else ctx.valid_T
        for group, router in enumerate(self._routers):
            here_T = picked_TG[:, group]
            part = router(x_TD, replace(ctx, valid_T=here_T, present_T=present_T))
            parts.append(part.keep(here_T[part.token_N]))
        flat = joined(parts, self.group_size)
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
    def needs_whole_batch(self) -> bool:
        """As the routers that it is made of."""
        return any(router.traits.needs_whole_batch for router in self._routers)

    @property
    def has_variable_k(self) -> bool:
        """As the routers that it is made of."""
        return any(router.traits.has_variable_k for router in self._routers)

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the mean over all routers of each loss that the algorithm brings itself."""
        found = [router.losses(part) for router, part in self._records(record)]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def objective(self, record: LayerRecord) -> Tensor | None:
        """Return the sum over all routers, each for its tokens: the logarithm of a joint choice is a sum too."""
        found = [(router.objective(part), part.valid_T) for router, part in self._records(record)]
        learned = [
            loss_T if valid_T is None else loss_T.where(valid_T, 0.0) for loss_T, valid_T in found if loss_T is not None
        ]
        return torch.stack(learned).sum(0) if learned else None

    @property
    def has_state(self) -> bool:
        """As the routers that it is made of."""
        return any(router.traits.has_state for router in self._routers)

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the sums of each router under its number; the one above comes last."""
        found = enumerate(self._records(record))
        return {f"{n}.{name}": value for n, (router, part) in found for name, value in router.statistics(part).items()}

    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Hand each router its own statistics and loads; a group's load is that of its experts over their k."""

        def own(number: int) -> dict[str, Tensor]:
            prefix = f"{number}."
            return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}

        load_GE = load_E.view(-1, self.group_size)
        for number, (router, load) in enumerate(zip(self._routers, load_GE, strict=True)):
            router.after_step(load, own(number))
        if self.outer is not None:
            self.outer.after_step(load_GE.sum(-1) // self.inner_k, own(len(load_GE)))

    def rows_per_token(self, experts_per_token: int) -> float:
        """Return those of all groups, or of the groups that the router above picks."""
        inner = [router.rows_per_token(self.inner_k) for router in self._routers]
        if self.outer is None:
            return sum(inner)
        return self.outer.rows_per_token(experts_per_token // self.inner_k) * sum(inner) / len(inner)

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token: every group's router looks at every token."""
        above = 0 if self.outer is None else self.outer.flops_per_token()
        return above + sum(router.flops_per_token() for router in self._routers)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Forward FLOPs of all routers; those of groups look at tokens of other groups too."""
        parts = [(router, replace(part, valid_T=record.valid_T)) for router, part in self._records(record)]
        return torch.stack([router.executed_flops(part) for router, part in parts]).sum()

    @property
    def _routers(self) -> list[Router]:
        return [router for router in self.inner if isinstance(router, Router)]

    def _records(self, record: LayerRecord) -> list[tuple[Router, LayerRecord]]:
        """Return each router with the record of its own part, padding left out."""
        routing = record.routing
        assert isinstance(routing, GroupedRouting)
        found = []
        for group, (router, part) in enumerate(zip(self._routers, routing.parts, strict=True)):
            valid_T = record.valid_T if routing.picked_TG is None else routing.picked_TG[:, group]
            found.append((router, _record(record, part, valid_T)))
        if self.outer is not None and routing.outer is not None:
            found.append((self.outer, _record(record, routing.outer, record.valid_T)))
        return found


def _record(record: LayerRecord, part: Routing, valid_T: Tensor | None) -> LayerRecord:
    part = part if valid_T is None else part.keep(valid_T[part.token_N])
    return replace(record, routing=part, kept=part, valid_T=valid_T)


def joined(parts: Sequence[Routing], group_size: int) -> GroupedRouting:
    """Put the routings of groups side by side: group g's experts come after those of the groups before it."""
    num_tokens = parts[0].num_tokens
    rectangle = all(part.top_k is not None for part in parts)

    def side_by_side(values: Sequence[Tensor]) -> Tensor:
        if not rectangle:
            return torch.cat(list(values))
        tables = [value.view(num_tokens, part.top_k or 0) for value, part in zip(values, parts, strict=True)]
        return torch.cat(tables, dim=1).reshape(-1)

    priorities = [part.priority_N for part in parts if part.priority_N is not None]
    logits = [part.logits_TE for part in parts if part.logits_TE is not None]
    scores = [part.scores_TE for part in parts if part.scores_TE is not None]
    kept = [torch.ones_like(part.token_N, dtype=torch.bool) if part.kept_N is None else part.kept_N for part in parts]
    return GroupedRouting(
        token_N=side_by_side([part.token_N for part in parts]),
        expert_N=side_by_side([part.expert_N + group * group_size for group, part in enumerate(parts)]),
        weight_N=side_by_side([part.weight_N for part in parts]),
        num_tokens=num_tokens,
        num_experts=group_size * len(parts),
        logits_TE=torch.cat(logits, dim=-1) if len(logits) == len(parts) else None,
        scores_TE=torch.cat(scores, dim=-1) if len(scores) == len(parts) else None,
        priority_N=side_by_side(priorities) if len(priorities) == len(parts) else None,
        top_k=sum(part.top_k or 0 for part in parts) if rectangle else None,
        kept_N=None if all(part.kept_N is None for part in parts) else side_by_side(kept),
        parts=tuple(parts),
    )


def _table(outer: Routing) -> tuple[Tensor, Tensor]:
    """Return picked_TG (bool) and weight_TG of a routing."""
    shape = outer.num_tokens, outer.num_experts
    kept_N = torch.ones_like(outer.token_N, dtype=torch.bool) if outer.kept_N is None else outer.kept_N
    place = outer.token_N, outer.expert_N
    picked_TG = torch.zeros(shape, dtype=torch.bool, device=kept_N.device).index_put(place, kept_N)
    return picked_TG, outer.weight_N.new_zeros(shape).index_put(place, outer.weight_N)
