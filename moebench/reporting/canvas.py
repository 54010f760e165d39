"""The sheet all figures are drawn on: matplotlib's objects alone, no pyplot, no state between figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale for lines on white.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", "--", ":")  # a second round through the palette looks different too
GREY = "#666666"


def look(index: int) -> dict[str, str]:
    """Return colour and line style of the arm with this place in the grid."""
    rounds, place = divmod(index, len(PALETTE))
    return {"color": PALETTE[place], "linestyle": LINE_STYLES[rounds % len(LINE_STYLES)]}


@contextmanager
def sheet(path: Path, title: str, *, width: float, height: float) -> Iterator[Figure]:
    """Make a figure of inches, and write it as PNG when the block ends."""
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
