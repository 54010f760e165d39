"""Several parents as one: branch-train-merge (arXiv:2208.03306) and branch-train-mix (arXiv:2403.07816).

`average`: the mean of all weights. `experts`: the feed-forward networks of dense parents become the experts of the
child, in the order of the parents, and all other weights are averaged; with the layout `whole_model` each parent's
blocks are one expert. Routers are the child's own, but for `average` with one router in all parents and the child.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import UsageError, require
from moebench.experts.bank import local_shard
from moebench.schema import CellConfig
from moebench.training.initial_weights.branch_domains import assign_parents
from moebench.training.initial_weights.parent import ParentWeights
from moebench.training.initial_weights.plan import BANK, DENSE_NAMES, ROUTER, SHARED, Shapes
from moebench.training.initial_weights.stacks import copy_experts

STACK = re.compile(r"(?P<backbone>.*)\.blocks\.0\.layer\.bank\.stacks\.(?P<expert>\d+)\.(?P<block>\d+)\.(?P<weight>.+)")
"""Names of weights of an expert of the layout `whole_model`."""
AVERAGED, STACKED = "averaged over the parents", "one parent in each expert"
"""Kinds of weights in the record of a load."""


def join_parents(
    config: CellConfig, parents: Sequence[ParentWeights], child_shapes: Shapes, expert_domains: Sequence[str] = ()
) -> ParentWeights:
    """Return the parents of a cell as one (`init.combine`); a single one without a combination is returned as it is.

    `expert_domains`: names of domains in the order of the child's experts, where its router has one for each. Raises
    UsageError for parents that differ in shape, and where the child's experts cannot be theirs.
    """
    if config.init.combine is None:
        (parent,) = parents
        return parent
    shares = config.init.combine_weights or [1.0] * len(parents)
    require(len(shares) == len(parents), "init.combine_weights", shares, f"{len(parents)} numbers, one for each parent")
    for parent in parents[1:]:
        _require_equal_shapes(parents[0], parent, parents)
    if config.init.combine == "average":
        return AveragedParents(parents, shares)
    sources = find_expert_sources(child_shapes, parents[0])
    parent_of_expert = assign_parents(config, [parent.settings for parent in parents], expert_domains)
    return StackedParents(parents, shares, sources, parent_of_expert, child_shapes)


def _has_experts(parent: ParentWeights) -> bool:
    return any(".bank." in name for name in parent.shapes)


def _list_shapes(parent: ParentWeights, parents: Sequence[ParentWeights]) -> Shapes:
    """Return the shapes of what can be averaged: different routers mean different things by weights of one name."""
    routers = {(each.settings.get("router") or {}).get("name") for each in parents}
    return {name: shape for name, shape in parent.shapes.items() if len(routers) == 1 or ROUTER not in name}


def _require_equal_shapes(first: ParentWeights, other: ParentWeights, parents: Sequence[ParentWeights]) -> None:
    sparse, dense = sorted((first, other), key=_has_experts, reverse=True)
    if _has_experts(sparse) and not _has_experts(dense):
        raise UsageError(
            f"init.combine: {sparse.label} has experts and {dense.label} has none (allowed: parents of one shape, for"
            " init.combine=experts dense ones)"
        )
    first_shapes, other_shapes = (_list_shapes(parent, parents) for parent in (first, other))
    for name in {**first_shapes, **other_shapes}:
        ours, theirs = first_shapes.get(name), other_shapes.get(name)
        if ours != theirs:
            shapes = ["none" if shape is None else list(shape) for shape in (ours, theirs)]
            raise UsageError(
                f"init.combine: {name} has the shape {shapes[0]} in {first.label} and {shapes[1]} in {other.label}"
                " (allowed: parents of one shape)"
            )


class AveragedParents(ParentWeights):
    """The weighted mean of parents of one shape: Σ_p a_p θ_p / Σ_p a_p, added up in fp64."""

    def __init__(self, parents: Sequence[ParentWeights], shares: Sequence[float]) -> None:
        self.parents = tuple(parents)
        self.shares = [share / sum(shares) for share in shares]
        self.label = f"the mean of {', '.join(parent.label for parent in parents)}"
        self.settings = parents[0].settings
        self.shapes: Shapes = _list_shapes(parents[0], parents)

    @override
    @torch.no_grad()
    def load(self, targets: Mapping[str, Tensor]) -> None:
        sums = {name: torch.zeros_like(local_shard(value), dtype=torch.float64) for name, value in targets.items()}
        for parent, share in zip(self.parents, self.shares, strict=True):
            loaded = {name: torch.empty_like(value) for name, value in targets.items()}
            parent.load(loaded)
            for name, value in loaded.items():
                sums[name] += share * local_shard(value).double()
        for name, value in targets.items():
            if not value.is_floating_point():
                raise UsageError(f"init.combine: {name} counts something, and counts have no mean")
            local_shard(value).copy_(sums[name])

    def describe(self, name: str) -> str:
        """Return how a weight of the combination comes about."""
        return AVERAGED


class StackedParents(AveragedParents):
    """Dense parents as one model with experts: each expert is of one parent, everything else is averaged.

    Its names are those of the child where a stack of experts, or an expert that is a whole model, has no name in the
    parents.
    """

    def __init__(
        self,
        parents: Sequence[ParentWeights],
        shares: Sequence[float],
        sources: Mapping[str, str],
        parent_of_expert: Sequence[int],
        child_shapes: Shapes,
    ) -> None:
        """`sources`: weight of experts of the child -> the dense weight of each parent that it is made of."""
        super().__init__(parents, shares)
        self.sources = dict(sources)
        self.parent_of_expert = tuple(parent_of_expert)
        labels = ", ".join(parents[index].label for index in self.parent_of_expert)
        self.label = f"experts of {labels}, all else averaged"
        stacked = {name: self._shape_of(name, child_shapes) for name in sources}
        shared = {f"{match['layer']}.{match['weight']}" for match in map(SHARED.fullmatch, child_shapes) if match}
        kept = {name: shape for name, shape in self.shapes.items() if name not in {*sources.values()} - shared}
        self.shapes = {**kept, **stacked}

    def _shape_of(self, name: str, child_shapes: Shapes) -> torch.Size:
        offered = self.parents[0].shapes[self.sources[name]]
        return offered if STACK.fullmatch(name) else torch.Size([child_shapes[name][0], *offered])

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        super().load({name: value for name, value in targets.items() if name not in self.sources})
        for index, parent in enumerate(self.parents):
            experts = [expert for expert, parent_of in enumerate(self.parent_of_expert) if parent_of == index]
            of_parent = {name: self._select(name, experts) for name in targets if name in self.sources}
            needed = {self.sources[name] for name, selected in of_parent.items() if selected}
            loaded = {name: torch.empty(parent.shapes[name]) for name in sorted(needed)}
            parent.load(loaded)  # all processes with the same names, whichever experts they hold
            for name, selected in of_parent.items():
                for expert in selected:
                    value = loaded[self.sources[name]]
                    if STACK.fullmatch(name):
                        targets[name].copy_(value)
                    else:
                        copy_experts(targets[name], {expert: value})

    def _select(self, name: str, experts: Sequence[int]) -> list[int]:
        """Return those of `experts` that a weight is of: a stack is of all, that of a whole model of one."""
        match = STACK.fullmatch(name)
        return [expert for expert in experts if match is None or int(match["expert"]) == expert]

    @override
    def describe(self, name: str) -> str:
        return STACKED if name in self.sources else AVERAGED


def find_expert_sources(child_shapes: Shapes, parent: ParentWeights) -> dict[str, str]:
    """Return weight of the child's experts -> the dense weight of the parent that each of its experts is.

    Raises UsageError for a child without experts, for experts that are no single feed-forward network, and for a parent
    that is not dense.
    """
    sources = {}
    for name in child_shapes:
        if ".bank." not in name:
            continue
        bank, stack = BANK.fullmatch(name), STACK.fullmatch(name)
        source = ""
        if bank and not bank["path"]:
            source = f"{bank['layer']}.{DENSE_NAMES[bank['weight']]}"
        elif stack:
            source = f"{stack['backbone']}.blocks.{stack['block']}.{stack['weight']}"
        if not source:
            raise UsageError(
                f"init.combine: experts, and {name} is of an expert that is no single network (allowed: layouts whose"
                " experts are feed-forward networks of one width, and whole_model)"
            )
        if source not in parent.shapes:
            lack = "experts already" if _has_experts(parent) else f"no {source}"
            raise UsageError(f"init.combine: experts, and {parent.label} has {lack} (allowed: dense parents)")
        sources[name] = source
    if not sources:
        raise UsageError("init.combine: experts, and the model has none (allowed: average, or a router with experts)")
    return sources
