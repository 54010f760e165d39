"""The table of a metric outside of the trained domains: its seeds, intervals, and verdicts that it does not change."""

import json
from dataclasses import replace

import pytest
from support.compared_grid import grid, render
from support.comparison_runs import list_cells

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.report import build_report


def test_out_of_domain_does_not_change_verdicts():
    plain = grid(3)
    results = [
        replace(r, metrics={**r.metrics, **{f"bits_per_byte/{name}": v for name in ("b", "out_of_domain")}})
        for r, v in zip(plain, [3.0 + r.seed + (r.arm == "switch") * (r.seed + 1) / 2 for r in plain], strict=True)
    ]
    comparison, without = (compare(r, expected=list_cells(plain), baseline="dense") for r in (results, plain))
    assert comparison.differences == without.differences
    arms = json.loads(build_report(comparison).to_json())["arms"]
    low, high = arms["switch"]["out_of_domain"].pop("interval")
    assert low < 5 < high
    # Half of a 95 % t interval of 3 seeds is 4.3027 / sqrt(3) = 2.4841 times their SD: 1, 1.5 and of the pairs 0.5.
    interval = [pytest.approx(1 - 1.2421, abs=1e-4), pytest.approx(1 + 1.2421, abs=1e-4)]
    assert arms["switch"]["out_of_domain"] == {
        "mean": 5.0,
        "seeds": {"0": 3.5, "1": 5.0, "2": 6.5},
        "difference": {"mean": 1.0, "interval": interval},
    }
    assert arms["dense"]["out_of_domain"]["difference"] is None
    assert arms["switch"]["domains"] == {"b": 5.0}
    assert json.loads(build_report(without).to_json())["arms"]["switch"]["out_of_domain"] is None
    table = build_report(comparison).to_markdown()
    assert "| dense | 3 | 4.0000 ± 2.4841 | – | +2.0000 |" in table
    assert "| switch | 3 | 5.0000 ± 3.7262 | +1.0000 ± 1.2421 | +3.0093 |" in table  # in domain 2 and 1.9907
    assert "held_out_domains" in table
    assert "ut of domain" not in build_report(without).to_markdown()
    assert all(len(line) <= 80 for line in render(comparison, 80).splitlines())


def test_out_of_domain_over_common_seeds_only():
    results = [
        replace(r, metrics={**r.metrics, "bits_per_byte/out_of_domain": 3.0 + r.seed + (r.arm == "switch")})
        for r in grid(2)
        if (r.arm, r.seed) not in (("dense", 1), ("switch", 0))
    ]
    comparison = compare(results, expected=list_cells(grid(2)), baseline="dense")
    assert "| switch | 1 | 5.0000 | – |" in build_report(comparison).to_markdown()
    assert json.loads(build_report(comparison).to_json())["arms"]["switch"]["out_of_domain"]["difference"] is None


def test_out_of_domain_and_in_domain_are_of_the_same_seeds():
    results = [
        replace(r, metrics={**r.metrics, "bits_per_byte/out_of_domain": 3.0 if r.seed < 2 else float("nan")})
        for r in grid(3)
    ]
    text = build_report(compare(results, expected=list_cells(results), baseline="dense")).to_markdown()
    # dense in domain: 2.00, 2.02 and 1.98, of which the last has no number outside; 3 - 2.01 and not 3 - 2.00
    assert "| dense | 2 | 3.0000 | – | +0.9900 |" in text
