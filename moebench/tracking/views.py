"""Saved views of an experiment in MLflow's UI: its own first view has no metric, no chart and only the parent run.

A saved view is a tag of the experiment that the UI writes for "Save as new view": JSON with a name and the state of the
page, compressed. A version of MLflow that does not know the form ignores the tag.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

VIEWS_VERSION = 1
"""Raise it when the views change: those of an experiment are then sent again."""
_TAG = "mlflow.sharedViewState."
BY_ROUTER, BY_ARM = "moebench-router", "moebench-arm"
"""Keys of the views: runs grouped by the parameter `router.name`, and by the tag `arm`."""
_NAMES = {BY_ROUTER: "By router", BY_ARM: "By arm"}
_CURVES = ("loss/task", "eval/load/max_violation", "eval/load/drop_rate", "train/grad_norm")
_BARS = ("test/load/max_violation", "test/load/drop_rate", "resources/tokens_per_s", "resources/total_params")
_COLUMNS = ("metrics.`test/load/max_violation`", "metrics.`resources/tokens_per_s`", "params.`router.name`")
_FOLDED = ("eval", "eval/load", "loss", "resources", "test", "test/load", "train", "train/load")
"""Sections that the UI makes by itself, closed below ours."""


@dataclass(frozen=True, kw_only=True)
class ExperimentView:
    """What the views of an experiment depend on."""

    metric: str
    """What arms are compared by, without a prefix."""
    arm_param: str = ""
    """The parameter in which arms differ; empty: not known."""
    time_ms: int = 0
    """Unix time shown as that of the views."""


def build_view_tags(view: ExperimentView) -> dict[str, str]:
    """Return the tags of the experiment that are its views; the same values always give the same tags."""
    states = {BY_ARM: _build_state(view, {"mode": "tag", "groupByData": "arm"})}
    if view.arm_param == "router.name":
        states[BY_ROUTER] = _build_state(view, {"mode": "param", "groupByData": "router.name"})
    return {f"{_TAG}{key}": _encode(_NAMES[key], state, view.time_ms) for key, state in states.items()}


def choose_view(tags: Sequence[str]) -> str:
    """Return which view of an experiment with these tags is shown first; empty if it has none."""
    return next((key for key in (BY_ROUTER, BY_ARM) if f"{_TAG}{key}" in tags), "")


def build_link(url: str, experiment_id: str, view: str) -> str:
    """Return the address of the charts of an experiment in the UI at `url`."""
    query = "workflowType=machine_learning&compareRunsMode=CHART" + (f"&viewStateShareKey={view}" if view else "")
    return f"{url}/#/experiments/{quote(experiment_id)}/runs?{query}"


def _encode(name: str, state: Mapping[str, Any], time_ms: int) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    envelope = {"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": f"deflate;{packed}"}
    return json.dumps(envelope)


def _build_state(view: ExperimentView, group: Mapping[str, str]) -> dict[str, Any]:
    """Return the state of the page: columns of its table, sections and charts, with the runs in groups."""
    columns = ["attributes.`Duration`", f"metrics.`test/{view.metric}`", *_COLUMNS]
    columns += [f"params.`{view.arm_param}`"] if view.arm_param else []
    curves, bars = (f"eval/{view.metric}", *_CURVES), (f"test/{view.metric}", *_BARS)
    sections = {"moebench-curves": "Curves", "moebench-bars": "Finished runs"}
    sections |= {f"moebench-{name}": name for name in _FOLDED}
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*dict.fromkeys(columns), "params.`seed`", "tags.`arm`"],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupsExpanded": {},
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [dict(group)]},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunCharts": [
            *(_build_chart(name, "LINE", "moebench-curves") for name in curves),
            *(_build_chart(name, "BAR", "moebench-bars") for name in bars),
        ],
        "compareRunSections": [_build_section(key, name) for key, name in sections.items()],
    }


def _build_section(key: str, name: str) -> dict[str, Any]:
    is_generated = name in _FOLDED
    section = {"uuid": key, "name": name, "display": not is_generated, "isReordered": not is_generated}
    return section | {"deleted": False, "isGenerated": is_generated}


def _build_chart(metric: str, kind: str, section: str) -> dict[str, Any]:
    chart = {
        "uuid": f"moebench-{kind.lower()}-{metric}",
        "type": kind,
        "runsCountToCompare": 30,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
    }
    line = {
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
    return chart | line if kind == "LINE" else chart
