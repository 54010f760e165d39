"""The views of an experiment in MLflow's UI are what the UI itself writes for a saved view."""

import base64
import json
import zlib

from moebench.tracking.views import BY_ARM, BY_ROUTER, ExperimentView, build_link, build_view_tags, choose_view


def decode(tag: str) -> tuple[str, dict[str, object]]:
    envelope = json.loads(tag)
    kind, _, packed = envelope["state"].partition(";")
    assert kind == "deflate"
    return envelope["name"], json.loads(zlib.decompress(base64.b64decode(packed)))


def test_views_group_by_router_and_by_arm_and_show_the_quality_first() -> None:
    tags = build_view_tags(ExperimentView(metric="nats", arm_param="router.name", time_ms=5))
    name, state = decode(tags[f"mlflow.sharedViewState.{BY_ROUTER}"])
    assert name == "By router"
    assert state["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "router.name"}]
    assert state["compareRunCharts"][0]["metricKey"] == "eval/nats"
    assert "metrics.`test/nats`" in state["selectedColumns"]
    _, state = decode(tags[f"mlflow.sharedViewState.{BY_ARM}"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    assert max(map(len, tags.values())) < 5000  # the limit of MLflow's servers


def test_arms_of_one_router_are_grouped_by_arm_alone() -> None:
    tags = build_view_tags(ExperimentView(metric="nats", arm_param="layout.name"))
    assert [*tags] == [f"mlflow.sharedViewState.{BY_ARM}"]
    assert choose_view([*tags]) == BY_ARM
    assert choose_view([]) == ""


def test_the_same_experiment_has_the_same_tags() -> None:
    view = ExperimentView(metric="nats", time_ms=5)
    assert build_view_tags(view) == build_view_tags(view)


def test_a_link_opens_the_charts_of_model_training() -> None:
    link = build_link("http://127.0.0.1:5000", "7", BY_ARM)
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning&")
    assert link.endswith(f"&viewStateShareKey={BY_ARM}")
