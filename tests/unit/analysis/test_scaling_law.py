"""The bilinear law: values by hand, planted laws found again, intervals that cover."""

import math

import numpy as np
import pytest

from moebench.analysis.scaling.bootstrap import bootstrap_law, identify
from moebench.analysis.scaling.fit import Points, choose_form, fit_law
from moebench.analysis.scaling.law import BilinearLaw, saturate_experts

PLANTED = BilinearLaw(a=-0.082, b=-0.108, c=0.009, d=1.104, e_start=1.85, e_max=314.0)
SIZES = (15e6, 25e6, 55e6, 130e6, 370e6, 1.3e9)
EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def make_points(law, sizes=SIZES, experts=EXPERTS, num_seeds=1):
    size, count = (np.repeat(values.ravel(), num_seeds) for values in np.meshgrid(sizes, np.array(experts, float)))
    return Points(num_params_M=size, num_experts_M=count, loss_M=10 ** law.predict_log_loss(size, count), size_M=size)


def disturb(points, generator, std_size, std_run):
    """Multiply each loss by a random factor of its size and one of its own; both in decades."""
    _, size_M = np.unique(points.size_M, return_inverse=True)
    shift = generator.normal(0, std_size, size_M.max() + 1)[size_M] + generator.normal(0, std_run, len(points))
    return Points(
        num_params_M=points.num_params_M,
        num_experts_M=points.num_experts_M,
        loss_M=points.loss_M * 10**shift,
        size_M=points.size_M,
    )


def test_saturation_by_hand():
    # 1/2 - 1/10 = 0.4, so E - 1 is shifted by 2.5: E = 3 gives 1 / (1/4.5 + 1/10) = 3.1034.
    assert saturate_experts([1, 3, 1e12], 2, 10) == pytest.approx([2, 3.103448, 10])
    assert saturate_experts([1, 3, 8], 1, math.inf) == pytest.approx([1, 3, 8])


def test_the_law_by_hand():
    law = BilinearLaw(a=-0.1, b=-0.2, c=0.01, d=1.0)
    # -0.1·6 - 0.2·2 + 0.01·6·2 + 1
    assert law.predict_log_loss(1e6, 100) == pytest.approx(0.12)
    # A dense model of 10^x has -0.1 x + 1 = 0.12.
    assert law.effective_params(1e6, 100) == pytest.approx(10**8.8)
    assert law.cutoff_params == pytest.approx(1e20)
    assert math.isinf(BilinearLaw(a=-0.1, b=-0.2, c=0.0, d=1.0).cutoff_params)


def test_effective_parameters_without_a_finite_value():
    # A dense loss that hardly falls with size: the dense model of equal loss has no size that a float could hold.
    flat = BilinearLaw(a=-1e-9, b=-0.2, c=0.0, d=1.0)
    assert flat.effective_params(1e6, 100) == pytest.approx(1e300)
    assert math.isnan(BilinearLaw(a=0.0, b=-0.2, c=0.0, d=1.0).effective_params(1e6, 100))


def test_effective_parameters_have_the_same_loss():
    for num_experts in (1, 8, 512):
        effective = PLANTED.effective_params(5e6, num_experts)
        assert PLANTED.predict_log_loss(effective, 1) == pytest.approx(PLANTED.predict_log_loss(5e6, num_experts))
    assert PLANTED.effective_params(5e6, 1) == pytest.approx(5e6)


@pytest.mark.parametrize(
    ("form", "law", "experts"),
    [
        ("saturating", PLANTED, EXPERTS),
        ("saturating", BilinearLaw(a=-0.05, b=-0.2, c=0.02, d=0.4, e_start=6.0, e_max=40.0), (1, 4, 16, 64, 256)),
        ("start", BilinearLaw(a=-0.05, b=-0.2, c=0.02, d=0.4, e_start=3.0), (1, 4, 16, 64)),
        ("plain", BilinearLaw(a=-0.05, b=-0.2, c=-0.01, d=0.4), (1, 4, 16)),
    ],
)
def test_a_planted_law_is_found_without_noise(form, law, experts):
    points = make_points(law, experts=experts)
    assert choose_form(points) == form
    fit = fit_law(points, form)
    assert fit.rms < 1e-7
    for name in ("a", "b", "c", "d", "e_start", "e_max"):
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-3)


def test_three_numbers_of_experts_are_needed():
    assert choose_form(make_points(PLANTED, experts=(1, 8))) is None
    assert choose_form(make_points(PLANTED, experts=(1, 8, 16, 32))) == "start"


def test_saturation_that_is_not_there_is_not_identified():
    points = make_points(BilinearLaw(a=-0.08, b=-0.1, c=0.01, d=1.1, e_start=2.0), experts=(1, 2, 4, 8, 16))
    bootstrap = bootstrap_law(disturb(points, np.random.default_rng(0), 0, 0.002), "saturating", 40)
    by_name = {estimate.name: estimate for estimate in bootstrap.estimates}
    assert by_name["e_max"].identification == "not identified"
    assert by_name["e_max"].high > 1e4


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("b", -0.2, -0.1, "identified"),
        ("b", -0.4, -0.1, "weakly identified"),
        ("b", -0.2, -0.01, "not identified"),
        ("c", -0.001, 0.01, "not identified"),
        ("c", 0.0, 0.01, "not identified"),
        ("d", 0.9, 1.2, "identified"),
        ("d", 0.2, 1.3, "not identified"),
        ("e_max", 100.0, 1001.0, "not identified"),
        ("e_max", 100.0, 999.0, "weakly identified"),
    ],
)
def test_identification_by_the_width_of_the_interval(name, low, high, expected):
    assert identify(name, low, high) == expected


def test_a_form_fixes_what_it_leaves_out():
    bootstrap = bootstrap_law(make_points(PLANTED, experts=(1, 4, 16)), "plain", 100)
    by_name = {estimate.name: estimate for estimate in bootstrap.estimates}
    assert (by_name["e_start"].value, by_name["e_start"].identification) == (1, "fixed")
    assert (by_name["e_max"].value, by_name["e_max"].identification) == (math.inf, "fixed")


def test_the_bootstrap_is_a_function_of_its_seed():
    points = disturb(make_points(PLANTED, experts=(1, 4, 16)), np.random.default_rng(0), 0, 0.003)
    first, again, other = (bootstrap_law(points, "plain", 100, seed).estimates for seed in (0, 0, 1))
    assert first == again
    assert first != other


def measure_coverage(form, experts, num_seeds, std_size, num_repeats):
    """Return the share of repeats in which each interval contains the planted coefficient."""
    law = BilinearLaw(
        a=-0.082,
        b=-0.108,
        c=0.009,
        d=1.104,
        e_start=1 if form == "plain" else 1.85,
        e_max=314.0 if form == "saturating" else math.inf,
    )
    sizes = SIZES if form == "saturating" else SIZES[::2]
    points = make_points(law, sizes, experts, num_seeds)
    generator = np.random.default_rng(0)
    covered = dict.fromkeys(("a", "b", "c", "d", "e_start", "e_max"), 0)
    for repeat in range(num_repeats):
        bootstrap = bootstrap_law(disturb(points, generator, std_size, 0.003), form, 199, repeat)
        for estimate in bootstrap.estimates:
            covered[estimate.name] += estimate.contains(getattr(law, estimate.name))
    return {name: count / num_repeats for name, count in covered.items()}


@pytest.mark.slow
def test_intervals_cover_planted_coefficients():
    # Conservative with three sizes, as few sizes are drawn often: 95 % are asked for.
    assert min(measure_coverage("plain", (1, 4, 16), 3, 0.0, 40).values()) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "experts", "num_seeds"),
    [("saturating", EXPERTS, 1), ("start", (1, 2, 4, 8, 16), 3), ("plain", (1, 4, 16), 3)],
)
@pytest.mark.parametrize("std_size", [0.0, 0.003])
def test_intervals_cover_with_and_without_a_deviation_of_each_size(form, experts, num_seeds, std_size):
    coverage = measure_coverage(form, experts, num_seeds, std_size, 40 if form == "saturating" else 100)
    # Of three sizes that deviate, a resample often has one or two: docs/scaling.md states the limit.
    assert min(coverage.values()) >= (0.84 if std_size and form != "saturating" else 0.93), coverage
