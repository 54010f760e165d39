"""The tables of a comparison: golden text, widths, marks and failures."""

import json
from dataclasses import replace

import pytest
from support.compared_grid import grid, render
from support.comparison_runs import list_cells

from moebench.analysis.compare.budget import build_budget_table
from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.values import BITS_PER_BYTE
from moebench.reporting.table_files import format_csv
from moebench.runs.result import Fault


def half_finished():
    """Fifteen cells done, one failed, two missing."""
    results = [result for result in grid() if result.arm != "expert_choice"]
    expected = list_cells(results)
    failed = replace(results[4], status="failed", error="loss is nan at step 212", fault=Fault.DIVERGED, metrics={})
    return compare([*results[:4], failed, *results[5:-1]], expected=expected, baseline="dense")


GOLDEN = """\
Quality: bits per byte on the test split, lower is better
arm                 seeds             mean       minus dense  p Holm  verdict
──────────────────────────────────────────────────────────────────────────────────────
dense                   5  2.0000 ± 0.0196                 –       –  baseline
switch             4 of 5  1.9852 ± 0.0183  −0.0098 ± 0.0027   0.004  1 of 5 diverged
sigmoid_bias_free  4 of 5  2.0030 ± 0.0247  +0.0005 ± 0.0029   0.622  undecided
Undecided against dense: sigmoid_bias_free.
Note: 1 of 15 cells have no result yet: this is an early look.
Note: switch: difference over common seeds only, without seed 1.
Note: sigmoid_bias_free: difference over common seeds only, without seed 4.
Note: switch has the best mean over the 3 seeds that all arms have finished and is not called best:
1 of 5 seeds diverged.

How sure: dense subtracted seed by seed
arm                pairs      p  p pooled  p Holm  exact p  detectable  power
──────────────────────────────────────────────────────────────────────────────
switch                 4  0.001     0.002   0.004        –      0.0067    low
sigmoid_bias_free      4  0.622     0.622   0.622        –      0.0067    low

How large: minus dense, margin of equivalence ±0.0200 (1 %)
arm                    all together  Hedges g       g, 95 %  p TOST
────────────────────────────────────────────────────────────────────
switch             −0.0098 ± 0.0036      −0.6  −1.4 to −0.2       –
sigmoid_bias_free  +0.0005 ± 0.0038      +0.0  −0.1 to +0.1       –

Seeds that would settle undecided arms, in 4 of 5 repeats
arm                if as observed  for the margin  if equal
────────────────────────────────────────────────────────────
sigmoid_bias_free            > 50               3         5

Pairing: each seed of an arm with the same seed of dense
arm                correlation  variance ratio
───────────────────────────────────────────────
switch                   +1.00          102.71
sigmoid_bias_free        +1.00          160.00
all arms                     –          133.27

Expert load on the evaluation set, mean over expert layers
arm                MaxVio    CV  entropy  dead  dropped  in training  unserved
───────────────────────────────────────────────────────────────────────────────
switch               0.80  0.40     0.97   0.5    1.2 %        2.0 %     0.0 %
sigmoid_bias_free    0.80  0.40     0.97   0.5    1.2 %        2.0 %     0.0 %

Compute per token: planned, and executed in training (train) and evaluation (eval)
arm                FLOPs  train   eval   × baseline  experts  train  eval
──────────────────────────────────────────────────────────────────────────
dense              2.47M  2.47M  2.47M  1.00 / 1.00        –      –     –
switch             2.47M  2.45M  2.47M  0.99 / 1.00     1.00   0.98  1.00
sigmoid_bias_free  2.47M  2.45M  2.47M  0.99 / 1.00     1.00   0.98  1.00

Cost: speed, parameters
arm                tokens/s  of baseline  active  total
────────────────────────────────────────────────────────
dense                 20.0k        100 %   1.23M  1.23M
switch                14.0k         70 %   1.23M  4.57M
sigmoid_bias_free     14.0k         70 %   1.23M  4.57M

FAILED switch, seed 1 (swi1): loss is nan at step 212
MISSING sigmoid_bias_free: no result yet for seed 4
diverged: the loss, a gradient or the final metric was not finite, or a spike ended the run
(train.spike_policy=stop). Means and differences are of the other seeds, a biased sample: such a
pair has no verdict, such an arm is never best.
± half of the 95 % t interval over seeds.
p: of the paired t-test. p pooled: p value of the difference by the noise of all arms together. p
Holm: the larger of both, corrected for 2 comparisons; better or worse means p Holm ≤ 0.05. exact p:
sign flips, 6 seeds or more, not corrected. detectable: the smallest true difference that 4 of 5
repeats would show, if the differences of all arms vary equally.
all together: intervals that hold for 2 comparisons at once in 95 % of repeats; ± elsewhere is one
interval by itself. Hedges g: the difference over the SD between seeds, corrected for few.
Equivalence within ±0.0200 (1 %) needs 5 seeds.
Limit: where the baseline or one of two arms has rare bad seeds, up to 8 % of tables claim a false
difference and up to 12 % a false equivalence, and intervals cover less (docs/statistics.md).
low power: 3 to 5 seeds can miss any difference smaller than the detectable one.
Seeds that would settle an arm: with p at Holm's strictest level, 0.05 / 2, all seeds planned from
the start, the SD of the pairs as all arms together show it. if as observed: the true difference is
the observed one, which is noisy, and so is this number; for the margin: it is as large as the
margin of equivalence, 1 % of the baseline's mean; if equal: there is none, and equivalence is
shown.
variance ratio: variance of the difference of unpaired seeds over that of paired ones; 1: pairing
gained nothing, 3: one pair is worth three unpaired seeds of each arm.
executed: forward FLOPs of the whole model and rows computed by experts, per token, mean over all
steps of training (each pass counts) and on the test split; × baseline: training / evaluation. in
training: assignments dropped, mean over all steps."""


def test_golden_table():
    text = "\n".join(line.rstrip() for line in render(half_finished(), 100).splitlines())
    assert text == GOLDEN


def test_without_details_the_answer_its_caveats_and_the_costs_are_left():
    short = build_report(half_finished()).without_details("--details: more.")
    assert [table.title.split(":")[0].split(",")[0] for table in short.tables] == [
        "Quality",
        "Seeds that would settle undecided arms",
        "Expert load on the evaluation set",
        "Compute per token",
        "Cost",
    ]
    assert short.caveats[0] == "Note: 1 of 15 cells have no result yet: this is an early look."
    assert len(short.problems) == 2
    assert short.notes == ("--details: more.",)


def test_mfu_has_a_column_where_a_run_knows_it():
    known = {0: 0.38, 1: 0.40, 2: 0.42}
    results = [
        replace(r, throughput=r.throughput | ({"mfu": known[r.seed]} if r.arm == "switch" else {})) for r in grid(3)
    ]
    comparison = compare(results, expected=list_cells(results), baseline="dense", allow_mismatch=True)
    text = build_report(comparison).to_markdown()
    assert "| arm | tokens/s | of baseline | MFU | active | total |" in text
    assert "| switch | 14.0k | 70 % | 40.0 % |" in text
    assert "| dense | 20.0k | 100 % | – |" in text
    assert text.count("MFU: model FLOPs utilization") == 1
    assert comparison.to_dict()["arms"]["switch"]["throughput"]["mfu"] == pytest.approx(0.4)
    assert "MFU" not in build_report(compare(grid(3), expected=list_cells(grid(3)), baseline="dense")).to_markdown()


def test_information_of_experts_has_a_table():
    known = {"switch": {"domain": 0.1234}, "expert_choice": {"domain": 0.5, "class": 0.25}}
    results = [
        replace(r, metrics=r.metrics | {f"load/information/{kind}": x for kind, x in known.get(r.arm, {}).items()})
        for r in grid()
    ]
    comparison = compare(results, expected=list_cells(results), baseline="dense", allow_mismatch=True)
    lines = build_report(comparison).to_markdown().splitlines()
    at = lines.index("**Information of experts about tokens**")
    assert lines[at + 2 : at + 7] == [
        "| arm | domain | class |",
        "| :-- | --: | --: |",
        "| switch | 0.123 | – |",
        "| expert_choice (non-causal) | 0.500 | 0.250 |",
        "",
    ]
    assert sum("I(label; expert) / H(label)" in line for line in lines) == 1
    assert comparison.to_dict()["arms"]["switch"]["load"]["information/domain"] == pytest.approx(0.1234)


@pytest.mark.parametrize("width", [80, 100])
def test_every_number_is_complete_at_this_width(width):
    results = grid()
    text = render(compare(results, expected=list_cells(results), baseline="dense"), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for figure in (
        "1.9900 ± 0.0181",
        "−0.0100 ± 0.0020",
        "<0.001",
        "better",
        "difference",
        "sigmoid_bias_free",
    ):
        assert figure in text
    for figure in ("(non-causal)", "2.47M", "1.23M", "4.57M", "70 %", "1.2 %", "14.0k"):
        assert figure in text
    assert "…" not in text


def test_legend_explains_marks_power_and_correction():
    results = grid()
    text = build_report(compare(results, expected=list_cells(results), baseline="dense")).to_markdown()
    assert "corrected for 3 comparisons" in text
    assert "low power: 3 to 5 seeds" in text
    assert "non-causal: its routing sees later tokens" in text
    assert "| expert_choice (non-causal) | 5 |" in text


def test_one_seed_shows_no_p_no_interval_no_best():
    results = grid(num_seeds=1)
    text = build_report(compare(results, expected=list_cells(results), baseline="dense")).to_markdown()
    assert "| switch | 1 | 1.9910 | −0.0090 | – | too few seeds |" in text
    assert "best" not in text
    assert "±" not in text
    assert "How sure" not in text


def test_mismatch_is_marked_and_explained():
    results = [replace(r, data_digest="other") if r.arm == "switch" else r for r in grid()]
    text = build_report(
        compare(results, expected=list_cells(results), baseline="dense", allow_mismatch=True)
    ).to_markdown()
    assert "| switch (≠data) | 5 |" in text
    assert "| not matched |" in text
    assert "- ≠data: trained on other data." in text
    assert "- Note: switch: data_digest is other, the baseline's data." in text


def test_names_with_markup_characters_are_kept():
    results = [replace(r, arm="top[bold]|k") if r.arm == "switch" else r for r in grid()]
    comparison = compare(results, expected=list_cells(results), baseline="dense")
    assert "top[bold]|k" in render(comparison, 100)
    assert "| top[bold]\\|k |" in build_report(comparison).to_markdown()


def test_json_is_the_comparison():
    comparison = half_finished()
    assert json.loads(build_report(comparison).to_json()) == comparison.to_dict()


def test_a_diverged_arm_is_never_better():
    results = [r for r in grid() if r.arm in ("dense", "switch")]
    for lost, rows in (
        ("switch", ("| dense | 5 | 2.0000 ± 0.0196 | – | – | baseline |", "| 2 of 5 diverged |")),
        ("dense", ("| – | – | baseline, 2 of 5 diverged |", "| baseline: 2 of 5 diverged |")),
    ):
        failure = {"status": "failed", "error": "loss is nan", "fault": Fault.DIVERGED, "metrics": {}}
        ended = [replace(r, **failure) if (r.arm, r.seed % 3) == (lost, 1) else r for r in results]
        comparison = compare(ended, expected=list_cells(results), baseline="dense")
        for text in (build_report(comparison).to_markdown(), render(comparison, 120)):
            assert not any("better" in line for line in text.splitlines() if line.startswith(("|", "switch", "dense")))
            assert "diverged: the loss, a gradient or the final metric was not finite, or a spike" in text
        assert all(row in build_report(comparison).to_markdown() for row in rows)
        assert json.loads(build_report(comparison).to_json())["arms"]["switch"]["difference"]["verdict"] == "diverged"
        assert max(len(line) for line in render(comparison, 80).splitlines()) <= 80


def test_the_title_names_the_split():
    results = [replace(r, validation={"bits_per_byte": 3.0 + 0.1 * r.seed}) for r in grid()]
    for split in ("test", "validation"):
        metric = replace(BITS_PER_BYTE, split=split)
        text = build_report(
            compare(results, expected=list_cells(results), baseline="dense", metric=metric)
        ).to_markdown()
        assert text.startswith(f"**Quality: bits per byte on the {split} split, lower is better**")


def test_the_file_of_budgets_has_fractions_with_all_digits():
    cost = {"target_flops_per_token": 3e6, "train_flops_per_token": 3.1e6, "train_last_flops_per_token": 2.9e6}
    results = [replace(r, cost={**r.cost, **cost, "eval_flops_per_token": 3e6, "budget_value": 1 / 3}) for r in grid(2)]
    table = build_budget_table(compare(results, expected=list_cells(results), baseline="dense", allow_mismatch=True))
    assert table.rows[0][1:] == ("3.00M", "+3.33 %", "−3.33 %", "+0.00 %", "0.3333", "no")
    row = format_csv(table).splitlines()[1]
    assert [float(value) for value in row.split(",")[1:-1]] == [3e6, 3.1e6 / 3e6 - 1, 2.9e6 / 3e6 - 1, 0.0, 1 / 3]
