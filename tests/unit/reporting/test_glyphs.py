"""Labels in any script, and labels that look like mathematics, in every figure that shows names of users."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.figure import draw_comparison
from moebench.analysis.specialisation.figures import draw_labels, draw_load
from moebench.analysis.sweep.axes import Axis
from moebench.analysis.sweep.figure import draw_curve
from moebench.analysis.sweep.points import Curve, Point
from moebench.reporting import glyphs
from moebench.reporting.canvas import new_figure
from moebench.runs.journal import Point as JournalPoint
from moebench.runs.result import RunResult
from moebench.training.label_tables import LabelTable

HARD_LABELS = ("$\\frac{$", "a{$_^%&#\\", "路由 switch", "маршрут", "مسار", "🧪", "$x$", "_hidden", "a\nb")
JOINED_LABELS = (" ".join(HARD_LABELS[:2]), " ".join(HARD_LABELS[2:7]), "\n".join(HARD_LABELS[7:]))
"""The same characters in fewer figures."""


@pytest.fixture(autouse=True)
def forget() -> None:
    glyphs._report.cache_clear()


def draw_arms(label: str, path: Path) -> None:
    points = [JournalPoint(step=step, time=0, metrics={"eval/bits_per_byte": 3 / step}, end=0) for step in range(1, 9)]
    cost = {"train_flops_per_token": 1.0, "eval_flops_per_token": 1.0, "train_tokens": 1.0}
    plain = {"status": "done", "error": None, "step": 9, "throughput": {}, "marks": (), "config": {}}
    plain |= {"data_digest": "d", "eval_digest": "e", "cost": cost}
    runs = [
        RunResult(id=f"{arm}{seed}", arm=arm, seed=seed, metrics={"bits_per_byte": 2 + 0.1 * seed}, **plain)
        for arm in ("dense", label)
        for seed in (0, 1)
    ]
    expected = [(run.arm, run.seed, run.id) for run in runs]
    comparison = compare(runs, expected=expected, baseline="dense")
    journals = {arm: dict.fromkeys((0, 1), points) for arm in ("dense", label)}
    draw_comparison(journals, path=path, title=label, comparison=comparison)


def draw_loads(label: str, path: Path) -> None:
    draw_load({"1": [3, 1, 0, 0]}, path=path, title=label)


def draw_tables(label: str, path: Path) -> None:
    counts = torch.tensor(np.eye(2, 4) + 1)
    draw_labels({label: LabelTable(values=(label, "other"), layers={"1": counts})}, path=path, title=label)


def draw_settings(label: str, path: Path) -> None:
    points = tuple(
        Point(
            arm=label,
            settings={"layout.overflow": value},
            quality={0: 1.0, 1: 2.0},
            flops={0: 1.0, 1: 1.0},
            load={},
            relative_flops=1.0,
        )
        for value in (label, "other")
    )
    axis = Axis(key="layout.overflow", values=(label, "other"))
    curve = Curve(title=label, metric="bits_per_byte", lower_is_better=True, axes=(axis,), points=points)
    draw_curve(curve, path)


@pytest.mark.parametrize(
    "labels", [JOINED_LABELS, pytest.param(HARD_LABELS, marks=pytest.mark.slow)], ids=["joined", "each"]
)
@pytest.mark.parametrize(
    ("draw", "suffix"),
    [
        pytest.param(draw, suffix, marks=() if suffix == "png" or draw is draw_loads else pytest.mark.slow)
        for draw in (draw_arms, draw_loads, draw_tables, draw_settings)
        for suffix in ("png", "svg", "pdf")
    ],
)
def test_no_label_fails_or_becomes_boxes(
    draw: Callable[[str, Path], None], suffix: str, labels: Sequence[str], tmp_path: Path
) -> None:
    for label in labels:  # a box is a warning of matplotlib, and warnings are errors
        draw(label, tmp_path / f"figure.{suffix}")
        assert (tmp_path / f"figure.{suffix}").stat().st_size > 3000


def test_what_no_font_has_is_escaped_and_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glyphs, "has_glyph", lambda character: character < "\u3000")
    for _ in range(2):
        with new_figure(tmp_path / "a.png", "路由 a", width=4, height=3) as figure:
            ax = figure.subplots()
            ax.plot([0, 1], label="由")
            ax.set_xticks([0, 1], ["路", "b"])
            ax.legend()
    FigureCanvasAgg(figure).draw()
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {"\\u8def\\u7531 a", "\\u7531", "\\u8def", "b"} <= texts
    assert capsys.readouterr().err == (
        "note: no installed font has 由 路: figures show them as \\u7531; install one, such as Noto Sans CJK\n"
    )
