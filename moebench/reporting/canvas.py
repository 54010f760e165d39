"""The canvas that all figures are drawn on: matplotlib's objects without pyplot, and no state between figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moebench.reporting.glyphs import escape_figure, list_families

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale for lines on white."""
LINE_STYLES = ("-", "--", ":")
"""After all colours of the palette, the next line style."""
GREY = "#666666"
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Metadata without the time, so that equal figures are equal files."""


def line_style(index: int) -> dict[str, str]:
    """Return colour and line style of the arm at this position in the grid."""
    style, color = divmod(index, len(PALETTE))
    return {"color": PALETTE[color], "linestyle": LINE_STYLES[style % len(LINE_STYLES)]}


@contextmanager
def new_figure(path: Path, title: str, *, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of `width` × `height` inches; write it when the block ends, in the format of the suffix."""
    # `parse_math`: a label such as `a{$` is text.
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    style |= {"text.parse_math": False, "font.family": [*list_families()]}
    # Text stays text: it can be searched, and edited with the fonts that are installed. No random names.
    style |= {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "moebench"}
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc in the working folder says, such as text.usetex
        mpl.rcParams.update(style)
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        yield figure
        escape_figure(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix.removeprefix(".").lower()
        figure.savefig(path, format=suffix, metadata=UNDATED.get(suffix))
