"""The figure of a gallery: a row for each expert, a column for each of its highest gates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from moebench.analysis.specialisation.snippets import Snippet, Snippets
from moebench.reporting.canvas import PALETTE, new_figure

if TYPE_CHECKING:
    from moebench.analysis.specialisation.gallery import ExpertGallery

MAX_CAPTION = 19
LOG_MEL_RANGE = (-2.0, 2.5)
"""Range of the colours in standard deviations of a band of a recording."""


def draw_gallery(experts: Sequence["ExpertGallery"], snippets: Snippets, *, path: Path, title: str) -> Path:
    """Draw the snippets of all experts; an expert without tokens has an empty row."""
    columns = max([len(expert.tokens) for expert in experts] + [1])
    width, height = (1.5, 1.15) if snippets.is_spectrogram else (1.05, 1.25)
    with new_figure(path, title, width=1.3 + width * columns, height=0.9 + height * len(experts)) as figure:
        axes = figure.subplots(len(experts), columns, squeeze=False)
        for row, expert in zip(axes, experts, strict=True):
            for index, ax in enumerate(row):
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_visible(False)
                if index < len(expert.tokens):
                    _draw_snippet(ax, snippets.read(expert.tokens[index]), expert.gates[index], snippets)
            row[0].set_ylabel(
                f"expert {expert.expert}\n{100 * expert.share:.1f} %", rotation=0, ha="right", va="center", fontsize=9
            )
        figure.supxlabel(f"{snippets.caption}; below: label and gate; left: share of assignments", fontsize=9)
    return path


def _draw_snippet(ax: Axes, snippet: Snippet, gate: float, snippets: Snippets) -> None:
    if snippets.is_spectrogram:
        low, high = LOG_MEL_RANGE
        ax.set_facecolor("#bbbbbb")  # beyond the ends of the recording
        ax.imshow(snippet.picture, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high)
    else:
        ax.imshow(snippet.picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if snippet.box is not None:
        left, top, width, height = snippet.box
        edge = PALETTE[5] if snippets.is_spectrogram else PALETTE[2]
        ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=edge, linewidth=1.6))
    caption = snippet.caption if len(snippet.caption) <= MAX_CAPTION else f"{snippet.caption[: MAX_CAPTION - 1]}…"
    ax.set_xlabel(f"{caption}  {gate:.2f}" if snippets.is_spectrogram else f"{caption}\n{gate:.2f}", fontsize=7)
