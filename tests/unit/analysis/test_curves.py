"""The figures of comparisons and loads: means, bands, positions of labels, written files."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.text import Text

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.figure import draw_comparison
from moebench.analysis.compare.learning_curve import (
    CurvePanel,
    average_seeds,
    find_limits,
    format_curve_label,
    spread_labels,
)
from moebench.analysis.compare.values import Comparison, Difference
from moebench.analysis.specialisation.figures import draw_load
from moebench.runs.journal import Point
from moebench.runs.result import Fault, RunResult

METRIC = "eval/bits_per_byte"


def difference(arm, mean, interval, verdict):
    return Difference(
        arm=arm, baseline="dense", seeds=(0, 1, 2), mean=mean, interval=interval, p=None, p_holm=None,
        p_exact=None, effect_sd=None, smallest_detectable=None, verdict=verdict,
    )  # fmt: skip


COMPARISON = Comparison(
    metric="bits_per_byte",
    lower_is_better=True,
    baseline="dense",
    arms=(),
    differences=(
        difference("switch", -0.01, (-0.02, -0.005), "better"),
        difference("sigmoid_bias_free", 0.001, None, "too few seeds"),
        difference("unborn", None, None, "too few seeds"),
    ),
    failed=(),
    missing=(),
    notes=(),
)


def point(step, metrics):
    return Point(step=step, time=0.0, metrics=metrics, end=0)


def points(values, every=10):
    return [point(every * i, {METRIC: value}) for i, value in enumerate(values)]


def test_mean_and_t_band_by_hand():
    curve = average_seeds("a", {0: points([4, 1]), 1: points([4, 2]), 2: points([4, 3])}, METRIC)
    assert curve.steps.tolist() == [0, 10]
    assert curve.means.tolist() == [4, 2]
    # [1, 2, 3]: half 2.484138 as in the statistics; [4, 4, 4] has no width
    assert curve.lows == pytest.approx([4, 2 - 2.484138], abs=1e-6)
    assert curve.highs == pytest.approx([4, 2 + 2.484138], abs=1e-6)
    assert (curve.band, curve.num_seeds, curve.num_started) == ("t", 3, 3)


def test_below_three_seeds_the_band_is_the_range():
    two = average_seeds("a", {0: points([4, 1]), 1: points([5, 2])}, METRIC)
    assert (two.lows.tolist(), two.highs.tolist(), two.band) == ([4, 1], [5, 2], "range")
    assert average_seeds("a", {0: points([4, 1])}, METRIC).band == "none"


def test_incomplete_seeds_are_left_out_of_the_mean():
    curve = average_seeds("a", {0: points([4, 2, 1]), 1: points([9, 9]), 2: points([4, 2, float("nan")])}, METRIC)
    assert curve.means.tolist() == [4, 2, 1]
    assert (curve.num_seeds, curve.num_started) == (1, 3)


def test_points_written_again_after_a_resume_count_once():
    again = [*points([4, 3]), point(10, {METRIC: 2.0, "other": 0.0})]
    again.append(point(20, {"loss/task": 9.0}))
    assert average_seeds("a", {0: again}, METRIC).means.tolist() == [4, 2]
    assert average_seeds("a", {0: points([])}, METRIC) is None


def test_limits_exclude_the_warm_up():
    curve = average_seeds("a", {0: points([9, 5, 2.2, 2.1, 2.0])}, METRIC)
    bottom, top = find_limits([curve], last=40)
    assert 1.9 < bottom < 2.0
    assert 2.2 < top < 2.3


def test_labels_are_spread_in_order_and_in_bounds():
    places = spread_labels([0.1, 0.11, 0.12, 0.9, 3.0], gap=0.05)
    assert places[:3] == pytest.approx([0.06, 0.11, 0.16])  # a stack centred on its mean
    assert all(high - low >= 0.05 - 1e-9 for low, high in pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 0.97


def test_draw_comparison_with_the_differences(tmp_path):
    rng = np.random.default_rng(0)
    journals = {
        arm: {seed: points(1.8 + 5 / np.arange(1, 21) + rng.normal(0, 0.01, 20)) for seed in range(3)}
        for arm in ("dense", "switch", "sigmoid_bias_free")
    }
    journals["switch"][2] = journals["switch"][2][:3]
    path = draw_comparison(journals, path=tmp_path / "new" / "curves.png", title="which?", comparison=COMPARISON)
    assert path == tmp_path / "new" / "curves.png"
    image_HWC = imread(path)
    assert image_HWC.shape[:2] == (660, 1800)  # 12 x 4.4 inches of 150 dots
    assert image_HWC.std() > 0.05  # not an empty sheet


def test_draw_comparison_of_many_arms_one_of_them_dead_early(tmp_path):
    journals = {f"arm_{i}": {0: points(2 + 0.01 * i + 5 / np.arange(1, 21))} for i in range(9)}
    journals["dead"] = {0: points([7.0, 6.0])}
    assert draw_comparison(journals, path=tmp_path / "many.png", title="ten arms").stat().st_size > 10_000


@pytest.mark.parametrize("num_arms", [2, 10])
def test_draw_comparison_shows_the_mark(tmp_path, monkeypatch, num_arms):
    written = []
    set_text = Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda text, value: written.append(value) or set_text(text, value))
    journals = {f"arm {number}": {0: points([3.0, 2.5, 2.0])} for number in range(num_arms)}
    draw_comparison(journals, CurvePanel(warning="below"), path=tmp_path / "curves.png", title="which?")
    assert "below" in written


def test_draw_comparison_refuses_to_draw_nothing(tmp_path):
    with pytest.raises(ValueError, match="no point of eval/bits_per_byte in the journals of dense"):
        draw_comparison({"dense": {0: []}}, path=tmp_path / "none.png", title="nothing")


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_draw_load(tmp_path, layers):
    load = {str(2 * layer + 1): [100, 0, 30, 10 * layer] for layer in range(layers)} | {"99": [0, 0, 0, 0]}
    path = draw_load(load, path=tmp_path / "load.png", title="switch, seed 0")
    assert path.stat().st_size > 5_000


def test_draw_load_refuses_to_draw_nothing(tmp_path):
    with pytest.raises(ValueError, match="no expert layer"):
        draw_load({}, path=tmp_path / "load.png", title="dense")


def run(arm, seed, value):
    """Return a run, which diverged if it has no value."""
    how = {"status": "failed", "error": "loss is nan", "fault": Fault.DIVERGED} if value is None else {}
    plain = {"status": "done", "error": None, "step": 20, "throughput": {}, "marks": (), "config": {}}
    cost = {"train_flops_per_token": 1.0, "eval_flops_per_token": 1.0, "train_tokens": 1.0}
    metrics = {} if value is None else {"bits_per_byte": value}
    names = {"id": f"{arm}-{seed}", "arm": arm, "seed": seed, "data_digest": "d", "eval_digest": "e"}
    return RunResult(**plain | how | names, cost=cost, metrics=metrics)


def test_the_figure_says_which_seeds_diverged(tmp_path, monkeypatch):
    drawn = {"dense": [2.0, 2.1, 1.9, 2.05], "switch": [1.0, 1.2, 0.9, None]}
    results = [run(arm, seed, value) for arm, values in drawn.items() for seed, value in enumerate(values)]
    comparison = compare(results, expected=[(r.arm, r.seed, r.id) for r in results], baseline="dense")
    journals = {arm: {seed: points([3.0, 2.0, 1.0]) for seed in range(4)} for arm in drawn}
    journals["switch"][3] = points([3.0])
    written = []
    annotate = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda ax, text, **where: written.append(text) or annotate(ax, text, **where))
    draw_comparison(journals, path=tmp_path / "curves.png", title="which?", comparison=comparison)
    assert "switch (3 of 4 seeds, 1 diverged)" in written
    assert "1 of 4 diverged, 3 seeds" in written
    assert not any("better" in text for text in written)
    # Diverged before its first evaluation: it has no points, and is not forgotten.
    del journals["switch"][3]
    written.clear()
    draw_comparison(journals, path=tmp_path / "curves.png", title="which?", comparison=comparison)
    assert "switch (1 diverged)" in written
    # Diverged in every seed: no curve and no difference, but a row.
    lost = [run(arm, seed, None if arm == "switch" else value) for arm, seed, value in
            ((r.arm, r.seed, r.metrics.get("bits_per_byte")) for r in results)]  # fmt: skip
    comparison = compare(lost, expected=[(r.arm, r.seed, r.id) for r in lost], baseline="dense")
    written.clear()
    draw_comparison({"dense": journals["dense"]}, path=tmp_path / "curves.png", title="which?", comparison=comparison)
    assert "4 of 4 diverged" in written
    plain = average_seeds("dense", journals["dense"], METRIC)
    assert format_curve_label(plain, is_visible=True) == "dense"
