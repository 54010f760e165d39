"""The figure of a worked example: how one router sends the tokens of two short sentences to a few experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.models.transformer import BatchContext, init_weights
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.routing.context import DataSummary
from moebench.routing.features.token_labels import TokenLabels
from moebench.routing.layer_name import LayerName
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing
from moebench.seeds import make_generator

SENTENCES = ("the cat sat on the mat today .", "we train the model and it learns .")
D_MODEL = 16
SIZES = (4, 8, 16)
"""Numbers of experts to try; the example has the first at which a token does not use all of them."""
COMMON_SCALE = 0.4
"""Scale of the vector that all tokens share: it makes the load uneven, so that a capacity drops."""
SCORES = LinearSegmentedColormap.from_list("scores", ["#FFFFFF", PALETTE[5], PALETTE[1]])
DROPPED = PALETTE[2]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A table of tokens × experts (or slots) with the dropped assignments."""

    title: str
    column: str
    weight_TE: Tensor
    chosen_TE: Tensor
    dropped_TE: Tensor | None = None
    load_E: Sequence[int] | None = None
    slots: int | None = None
    """Capacity of one expert; None: no limit."""

    @property
    def unserved_T(self) -> Tensor:
        """Tokens that no expert computes (bool)."""
        kept_TE = self.chosen_TE if self.dropped_TE is None else self.chosen_TE & ~self.dropped_TE
        return ~kept_TE.any(1)


def draw_router(name: str, path: Path, seed: int = 0) -> Path:
    """Draw scores, training with capacity factor 1, and dropless evaluation; of soft routing both mixtures."""
    example = Example(name, seed)
    panels = example.build_panels()
    max_columns = max(panel.weight_TE.shape[1] for panel in panels)
    width = 1.1 + sum(1.2 + 0.36 * max(panel.weight_TE.shape[1], 4) for panel in panels)
    title = f"{name}: {len(example.words)} tokens, {example.num_experts} experts"
    height = 2.1 + 0.27 * len(example.words)
    with new_figure(path, title, width=max(width, 7.0), height=height) as figure:
        ratios = [max(panel.weight_TE.shape[1], 4) for panel in panels]
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios, sharey=True).ravel()
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, example, small=max_columns > SIZES[1])
        figure.supxlabel(_caption(panels), fontsize=8, color=GREY)
    return path


class Example:
    """The tokens, the router and its layer."""

    def __init__(self, name: str, seed: int) -> None:
        self.words = [word for sentence in SENTENCES for word in sentence.split()]
        self.length = len(SENTENCES[0].split())
        self.seed = seed
        vocabulary = sorted(set(self.words))
        self.token_id_BL = torch.tensor([vocabulary.index(word) for word in self.words]).view(-1, self.length)
        entry = ROUTERS.get(name)
        self.config = entry.item.Config()  # type: ignore[call-arg]  # its own Config has its name as a default
        self.num_experts = _choose_num_experts(entry.item, self.config)
        context = RouterBuildContext(
            d_model=D_MODEL,
            num_experts=self.num_experts,
            data=DataSummary(
                vocab_size=len(vocabulary),
                token_count_V=self.token_id_BL.flatten().bincount(),
                sequence_length=self.length,
                num_domains=len(SENTENCES),
            ),
        )
        self.layer = self._build_layer(entry.item, context)

    def _build_layer(self, router_class: type[Router], context: RouterBuildContext) -> MoELayer:
        router = router_class(self.config, context)
        init_weights(router, self.seed)
        draw = make_generator(self.seed, "worked example")
        for parameter in router.parameters():  # initial gates are too small for visible choices
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3, generator=draw)
        bank = ExpertBank(D_MODEL, 1, self.num_experts, "gelu")
        init_weights(bank, self.seed)
        return MoELayer(
            router,
            bank,
            LayerOptions(
                experts_per_token=router_class.experts_per_token(self.config, self.num_experts),
                capacity=Capacity(train=1.0),
            ),
        )

    @torch.no_grad()
    def route_tokens(self, *, training: bool) -> LayerRecord:
        """Route the tokens, each the vector of its word plus a small one of its position."""
        draw = make_generator(self.seed, "worked example", "tokens")
        common_D = torch.randn(D_MODEL, generator=draw)
        word_VD = torch.randn(len(set(self.words)), D_MODEL, generator=draw)
        position_TD = torch.randn(len(self.words), D_MODEL, generator=draw)
        x_TD = word_VD[self.token_id_BL.flatten()] + COMMON_SCALE * common_D + 0.3 * position_TD
        domain_B = torch.arange(len(SENTENCES))
        ctx = BatchContext(
            training=training,
            seed=self.seed,
            token_id_BL=self.token_id_BL,
            domain_B=domain_B,
            features={TokenLabels: self.token_id_BL.flatten()},
        )
        return self.layer.train(training).route(x_TD, ctx.route(LayerName(), self.length, x_TD.device))

    def build_panels(self) -> list[Panel]:
        """Return the panels from left to right."""
        trained = self.route_tokens(training=True)
        if isinstance(trained.routing, SoftRouting):
            return _mixture_panels(trained.routing)
        evaluated = self.route_tokens(training=False)
        if isinstance(evaluated.routing, MergeRouting):
            return [_merge_panel(evaluated.routing)]
        chain = self.layer.router.form.is_chain  # a chain has no capacity
        title = "training" if chain else "training, capacity factor 1"
        panels = [_assignment_panel(title, trained, None if chain else self.slots)]
        panels.append(_assignment_panel("evaluation, dropless", evaluated, None))
        assert isinstance(evaluated.routing, Routing)
        scores_TE = evaluated.routing.scores_TE
        if scores_TE is not None:
            all_TE = torch.ones_like(scores_TE, dtype=torch.bool)
            panels.insert(0, Panel(title="scores", column="expert", weight_TE=scores_TE, chosen_TE=all_TE))
        return panels

    @property
    def slots(self) -> int | None:
        """Capacity of an expert in training."""
        return self.layer.capacity.slots(
            training=True,
            num_tokens=len(self.words),
            experts_per_token=self.layer.experts_per_token,
            num_experts=self.num_experts,
        )


def _choose_num_experts(router_class: type[Router], config: Any) -> int:
    for number in SIZES:
        try:
            router_class.check(config, number)
        except UsageError:
            continue
        if router_class.experts_per_token(config, number) < number:
            return number
    return SIZES[0]


def _assignment_panel(title: str, record: LayerRecord, slots: int | None) -> Panel:
    routing, kept = record.routing, record.kept
    assert isinstance(routing, Routing)
    assert isinstance(kept, Routing)
    shape = (routing.num_tokens, routing.num_experts)
    index = (routing.token_N, routing.expert_N)
    dropped_N = routing.counted_N & ~kept.counted_N
    return Panel(
        title=title,
        column="expert",
        weight_TE=torch.zeros(shape).index_put(index, routing.weight_N),
        chosen_TE=torch.zeros(shape, dtype=torch.bool).index_put(index, routing.counted_N),
        dropped_TE=torch.zeros(shape, dtype=torch.bool).index_put(index, dropped_N),
        load_E=routing.load_E.tolist(),
        slots=slots,
    )


def _mixture_panels(routing: SoftRouting) -> list[Panel]:
    tables = {
        "dispatch: how much of a token is in a slot": routing.dispatch_BLS,
        "combine: how much of a slot a token gets": routing.combine_BLS,
    }
    return [
        Panel(title=title, column="slot", weight_TE=weight_TS, chosen_TE=weight_TS > 0)
        for title, weight_TS in ((title, routing.to_tokens(table)) for title, table in tables.items())
    ]


def _merge_panel(routing: MergeRouting) -> Panel:
    weight_TE = routing.weight_TE
    title = "share of an expert's parameters\nin a token's network"
    return Panel(title=title, column="expert", weight_TE=weight_TE, chosen_TE=weight_TE > 0)


def _draw_panel(ax: Axes, panel: Panel, example: Example, *, small: bool) -> None:
    weight_TE = panel.weight_TE.numpy()
    shown_TE = np.where(panel.chosen_TE.numpy(), weight_TE, 0.0)
    if panel.dropped_TE is not None:
        shown_TE = np.where(panel.dropped_TE.numpy(), 0.0, shown_TE)
    low, high = float(shown_TE.min()), max(float(weight_TE.max()), 1e-9)
    ax.imshow(shown_TE, cmap=SCORES, vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
    for token, expert in panel.chosen_TE.nonzero().tolist():
        dropped = panel.dropped_TE is not None and bool(panel.dropped_TE[token, expert])
        dark = not dropped and weight_TE[token, expert] - low > 0.6 * (high - low)
        text = "×" if dropped else f"{weight_TE[token, expert]:.2f}".removeprefix("0")
        color = DROPPED if dropped else "white" if dark else "black"
        size = 12 if dropped else 5.5 if small else 7
        ax.text(expert, token, text, ha="center", va="center", fontsize=size, color=color)
    _draw_frame(ax, panel, example)


def _draw_frame(ax: Axes, panel: Panel, example: Example) -> None:
    num_tokens, num_columns = panel.weight_TE.shape
    ax.set_title(panel.title, loc="left", fontsize=9)
    ax.set_yticks(range(num_tokens), example.words)
    ax.hlines(np.arange(example.length, num_tokens, example.length) - 0.5, -0.5, num_columns - 0.5, color="black", lw=1)
    ax.set_xticks(np.arange(num_columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(num_tokens + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="#e0e0e0", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    if panel.load_E is None:
        per_expert = num_columns // example.num_experts
        labels = [f"{column // per_expert}" for column in range(num_columns)]
        ax.set_xticks(range(num_columns), labels)
        ax.set_xlabel("expert" if panel.column == "expert" else "expert of the slot")
    else:
        room = "" if panel.slots is None else f" (room for {panel.slots})"
        ax.set_xticks(range(num_columns), [f"{e}\n{load}" for e, load in enumerate(panel.load_E)])
        ax.set_xlabel(f"expert, below it its tokens{room}")
        unserved = panel.unserved_T.nonzero().flatten().tolist()
        for token in unserved:
            ax.text(num_columns - 0.4, token, "unserved", va="center", fontsize=6.5, color=DROPPED, clip_on=False)


def _caption(panels: Sequence[Panel]) -> str:
    if panels[-1].column == "slot":
        return "each sentence has its own slots; columns of dispatch and rows of combine sum to 1 in a sentence"
    return "numbers: the weight of the expert's output; ×: chosen, and dropped because the expert was full"
