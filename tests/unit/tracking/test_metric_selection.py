"""A tracker gets about 40 metrics of a run, and a table with all of them."""

from moebench.runs.journal import Point
from moebench.tracking.metric_selection import MAX_NAMES, select_names


def select(*names: str) -> list[str]:
    return select_names(Point(step=1, time=0.0, metrics=dict.fromkeys(names, 1.0), end=0))


def test_quality_load_and_loss_are_sent() -> None:
    names = ["loss/task", "train/grad_norm", "train/load/max_violation", "eval/load/entropy", "test/nats", "spike/loss"]
    assert select(*names) == names


def test_what_another_metric_says_too_is_left_to_the_table() -> None:
    assert select("balance/z", "time/data_share", "train/load/cv", "eval/load/cv", "test/load/flops_per_token") == []
    assert select("parallel/sent_mib", "parallel/rows/rank_0", "rewind/1/loss", "test/class_accuracy/cat") == [
        "parallel/sent_mib"
    ]


def test_domains_are_left_to_the_table_but_those_held_out_of_training() -> None:
    domains = ["eval/nats/law", "eval/nats/law/en", "eval/nats/out_of_domain"]
    load = ["eval/load/entropy", "eval/load/entropy/out_of_domain"]
    assert select("eval/nats", *domains, *load) == ["eval/nats", "eval/nats/out_of_domain", "eval/load/entropy"]


def test_a_plugin_with_very_many_metrics_has_a_limit() -> None:
    names = [f"own/metric{number}" for number in range(1000)]
    assert select(*names) == names[:MAX_NAMES]


def test_the_number_of_collapsed_layers_is_sent_and_their_details_are_not() -> None:
    assert select("collapse/layers", "collapse/3/expert", "collapse/3/share") == ["collapse/layers"]
