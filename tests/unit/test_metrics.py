"""The declarations of metrics: unique, complete for the built-in tasks, and the source of docs/metrics.md."""

from pathlib import Path

import pytest

from moebench.catalogue.metrics import build_metrics_report, render_metrics_page
from moebench.metrics import GROUPS, METRICS, find_metric
from moebench.reporting.metrics import FORMATTERS, explain_metrics, format_metric
from moebench.tasks.task import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_no_metric_is_declared_twice() -> None:
    names = [metric.name for group in GROUPS for metric in group.metrics]
    assert len(names) == len(set(names)) == len(METRICS)


def test_every_metric_has_a_meaning_and_a_known_format() -> None:
    for metric in METRICS.values():
        assert metric.meaning[0].isupper(), metric.name
        assert metric.meaning.endswith("."), metric.name
        assert metric.format in FORMATTERS


@pytest.mark.parametrize(
    ("recorded_name", "name"),
    [
        ("bits_per_byte", "bits_per_byte"),
        ("eval/bits_per_byte", "bits_per_byte"),
        ("test/bits_per_byte/law/en", "bits_per_byte"),
        ("test/bits_per_byte/out_of_domain", "bits_per_byte"),
        ("train/load/cv", "load/cv"),
        ("test/load/information/domain/out_of_domain", "load/information/KIND"),
        ("load/train_drop_rate", "load/train_drop_rate"),
        ("loss/task", "loss/task"),
        ("loss/load_balance", "loss/NAME"),
        ("balance/z", "balance/NAME"),
        ("test/few_shot/5", "few_shot/SHOTS"),
        ("class_accuracy/cat", "class_accuracy/CLASS"),
        ("parallel/rows/rank_3", "parallel/rows/rank_RANK"),
        ("resources/parallel/sent_mib", "parallel/sent_mib"),
        ("resources/tokens_per_s", "tokens_per_s"),
        ("resources/train_tokens", "train_tokens"),
        ("mean/top_k k=2", "mean/ARM"),
        ("system/cpu_percent", "system/cpu_percent"),
        ("train/tokens_per_s", "train/tokens_per_s"),
    ],
)
def test_a_recorded_name_is_found(recorded_name: str, name: str) -> None:
    metric = find_metric(recorded_name)
    assert metric is not None
    assert metric.name == name


@pytest.mark.parametrize("name", ["bits", "eval/loss/task", "train/bits_per_byte", "load/cvs", "parallel/rows"])
def test_an_undeclared_name_is_not_found(name: str) -> None:
    assert find_metric(name) is None


def test_built_in_tasks_are_compared_by_declared_metrics() -> None:
    for entry in TASKS.entries():
        if entry.item.__module__.startswith("moebench."):
            direction = "lower" if entry.facts.lower_is_better else "higher"
            assert METRICS[entry.facts.metric].better == direction, entry.name


def test_values_are_written_in_the_declared_format() -> None:
    assert format_metric("load/drop_rate", 0.0125) == "1.2 %"
    assert format_metric("load/dead_experts", 1.0) == "1.0"
    assert format_metric("parallel/sent_mib", 0.5) == "0.50 MiB"
    assert format_metric("flops_per_token", 2.469e6) == "2.47M"
    assert format_metric("effect_sd", -0.84) == "−0.8"
    assert format_metric("load/cv", None) == "–"


def test_a_legend_begins_with_the_column_and_keeps_formulas() -> None:
    assert explain_metrics("load/dead_experts") == "dead: experts with less than 1 % of an even load."
    assert explain_metrics("load/information/KIND").startswith("information of experts: I(label; expert)")


def test_the_list_as_json_has_every_declaration() -> None:
    values = build_metrics_report().values
    assert [value["name"] for value in values] == list(METRICS)
    assert all({"unit", "better", "format", "meaning", "measured", "prefixes"} <= set(value) for value in values)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render_metrics_page(), "docs/metrics.md is old: make docs"
