"""docs/routers.md, made from the registry: a table of all routers and a section for each."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from moebench.catalogue.describe import describe, to_text
from moebench.routing.context import DataSummary
from moebench.routing.router import ROUTERS, Router, RouterBuildContext

HEAD = """# The routers

Made by `moebench show --all-routers` from what each router says of itself; `make docs` writes it anew. Causality, batch
dependence, balance and variable k are measured by the contract tests, not believed.

What they take beside a plain top-k, as `moebench bench router` measured it on two cores:
[results/published/bench_router.md](../results/published/bench_router.md). How they train side by side:
[causal ones](../results/published/routers_language.md), [all, where looking both ways is
allowed](../results/published/routers_bidirectional.md).
"""
LEGEND = """- **causal**: no token's routing depends on later tokens. *dropless*: it does with a capacity.
  *eval*: it does in training.
- **batch**: in evaluation, it matters what else is in the batch.
- **any k**: tokens differ in their number of experts.
- **even**: in training every expert has the same load by construction, where the sizes divide.
- **learns**: the task loss reaches the router; **own losses**: those that only this router has.
"""
COLUMNS = ("router", "family", "causal", "batch", "any k", "even", "learns", "own losses", "paper")
D_MODEL, NUM_EXPERTS, LENGTH = 512, 8, 1024
"""The example by which a section says what its router costs."""
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})|doi:(10\.[^\s,;]*[^\s,;.)])")


def render_routers_page() -> str:
    """Return the whole page as Markdown, ending in a newline."""
    found = [describe(name) for name in ROUTERS.names()]
    rows = [tuple(summary(one | {"name": f"[{one['name']}](#{one['name']})"}, _linked).values()) for one in found]
    return "\n".join([HEAD, *_table(COLUMNS, rows), "", LEGEND, *("\n".join(_section(one)) for one in found)])


def page(name: str) -> str:
    """Return the section of one router as Markdown."""
    return "\n".join(_section(describe(name)))


def summary(found: Mapping[str, Any], paper: Callable[[str], str] = str) -> dict[str, str]:
    """Return the row of a router, by column; `paper` may make a link of the number of its paper."""
    causal = "yes" if found["causal"] else "eval" if found["causal_in_evaluation"] else "no"
    if found["causal"] and found["causal_with_capacity"] is False:
        causal = "no drop"
    cells = (
        found["name"],
        found["family"],
        causal,
        to_text(found["batch_dependent"]),
        to_text(found["variable_k"]),
        to_text(found["balanced"]),
        to_text(found["learned"]),
        to_text(found["own_losses"]),
        paper(_first_paper(found["paper"])),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _section(found: dict[str, Any]) -> Iterator[str]:
    yield f"## {found['name']}\n"
    yield f"{found['about']}\n"
    yield f"```\n{found['equation']}\n```\n"
    for title, text in (("When to use it", found["use"]), ("What can go wrong", found["beware"])):
        if text:
            yield f"**{title}.** {text}\n"
    yield f"**What it costs.** {_cost(ROUTERS.get(found['name']).item, found['cost'])}\n"
    yield f"**Causal.** {summary(found)['causal'].capitalize()}: {found['causal_reason']}.\n"
    yield f"**Source.** {_linked(found['paper'])}.\n"
    if found["options"]:
        lines = [(f"`{one['name']}`", f"`{to_text(one['default'])}`", one["about"]) for one in found["options"]]
        yield "\n".join(_table(("option", "default", "meaning"), lines)) + "\n"


def _cost(router_class: type[Router], growth: str) -> str:
    """Say how many experts compute and what the router itself costs, in an example."""
    config = router_class.Config()  # type: ignore[call-arg]  # each router's own Config has its name as a default
    ids = torch.ones(2, dtype=torch.int64)
    context = RouterBuildContext(
        d_model=D_MODEL,
        num_experts=NUM_EXPERTS,
        data=DataSummary(
            vocab_size=len(ids),
            token_count_V=ids,
            sequence_length=LENGTH,
            num_domains=NUM_EXPERTS,
        ),
    )
    router = router_class(config, context)
    rows = router.rows_per_token(router_class.experts_per_token(config, NUM_EXPERTS))
    flops = router.flops_per_token()
    own = f"{flops:,} FLOPs per token in the router itself" if flops else "nothing to multiply in the router itself"
    experts = "1 expert" if rows == 1 else f"{rows:g} experts"
    return (
        f"With {NUM_EXPERTS} experts and a width of {D_MODEL}: {experts} per token, {own}. Choosing takes O({growth})."
    )


def _first_paper(text: str) -> str:
    found = PAPER.search(text)
    return found.group() if found else ""


def _linked(text: str) -> str:
    def link(found: re.Match[str]) -> str:
        arxiv, doi = found.groups()
        address = f"https://arxiv.org/abs/{arxiv}" if arxiv else f"https://doi.org/{doi}"
        return f"[{found.group()}]({address})"

    return PAPER.sub(link, text)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = tuple(header)
    return [_line(cells) for cells in (header, ["---"] * len(header), *rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"
