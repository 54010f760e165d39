"""Hypothesis strategies for routings: lists and rectangles, with masked assignments, ties, empty and hot experts."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from moebench.routing.values import Routing


def make_generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def tensor_of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@st.composite
def routings(draw: st.DrawFn, with_priority: bool | None = None, holes: bool = False, scored: bool = False) -> Routing:
    """Draw a list of assignments in any order, with many ties among weights, priorities and scores.

    `holes`: some assignments may be masked. `scored`: with scores for every token and expert.
    """
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    pair = st.tuples(st.integers(0, max(num_tokens - 1, 0)), st.integers(0, num_experts - 1))
    pairs = draw(st.lists(pair, unique=True, max_size=24)) if num_tokens else []
    value = st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=len(pairs), max_size=len(pairs))
    has_priority = draw(st.booleans()) if with_priority is None else with_priority
    routing = Routing(
        token_N=torch.tensor([token for token, _ in pairs], dtype=torch.int64),
        expert_N=torch.tensor([expert for _, expert in pairs], dtype=torch.int64),
        weight_N=tensor_of(draw(value)),
        num_tokens=num_tokens,
        num_experts=num_experts,
        priority_N=tensor_of(draw(value)) if has_priority else None,
    )
    return _add_holes_and_scores(draw, routing, holes, scored)


@st.composite
def rectangles(draw: st.DrawFn, holes: bool = False, scored: bool = False) -> Routing:
    """Draw a token-choice rectangle; all tokens may prefer the same experts."""
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    top_k, hot = draw(st.integers(1, num_experts)), draw(st.booleans())
    generator = make_generator(draw(st.integers(0, 1000)))
    preference_TE = torch.rand(1 if hot else num_tokens, num_experts, generator=generator).expand(num_tokens, -1)
    weight_TK = torch.rand(num_tokens, top_k, generator=generator)
    routing = Routing.from_top_k(preference_TE.topk(top_k, dim=-1).indices, weight_TK, num_experts=num_experts)
    return _add_holes_and_scores(draw, routing, holes, scored)


def build_crowded(seed: int) -> Routing:
    """Build a scored routing in which many tokens prefer the same few experts, several of which are full.

    Drawn from a seed, because independent draws rarely exceed a capacity.
    """
    generator = make_generator(seed)
    num_tokens, num_experts = (int(torch.randint(*span, (), generator=generator)) for span in ((5, 10), (4, 6)))
    top_k = int(torch.randint(1, 4, (), generator=generator))
    common_E = torch.rand(num_experts, generator=generator)
    score_TE = (common_E + torch.rand(num_tokens, num_experts, generator=generator) / 4) / 1.25
    weight_TK, expert_TK = score_TE.topk(top_k, dim=-1)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts, scores_TE=score_TE)
    return routing.keep(torch.rand(num_tokens * top_k, generator=generator) < 0.9)


crowded_routings = st.integers(0, 9999).map(build_crowded)


def _add_holes_and_scores(draw: st.DrawFn, routing: Routing, holes: bool, scored: bool) -> Routing:
    if holes and draw(st.booleans()):
        size = routing.token_N.numel()
        routing = routing.keep(torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool))
    if scored:  # seven values, so that there are ties and zeros
        shape = (routing.num_tokens, routing.num_experts)
        score_TE = torch.randint(7, shape, generator=make_generator(draw(st.integers(0, 1000)))) / 6
        routing = replace(routing, scores_TE=score_TE)
    return routing
