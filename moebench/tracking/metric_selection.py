"""Which metrics of a run a tracker gets as curves: about 35, since its UI draws a chart for each.

All of them are in the journal, in `result.json`, and in the table `metrics.json` of the run in the tracker.
"""

import re
from collections.abc import Collection
from functools import lru_cache

from moebench.runs.journal import Point
from moebench.tasks.domain_metrics import OUT_OF_DOMAIN

MAX_NAMES = 24
"""Metrics sent of one point, in the order of the journal."""
SHOWN_RESOURCES = (
    *("active_params", "total_params", "train_flops_per_token", "train_experts_per_token", "train_tokens"),
    *("tokens_per_s", "mfu", "train_s"),
)
"""Costs and speeds of a finished run that are sent as metrics."""
_SHOWN = {
    "train/load": ("max_violation", "drop_rate"),
    "parallel": ("all_to_all_share", "wait_share", "sent_mib", "rank_load_max", "peak_memory_gib"),
    "spike": ("loss", "grad_norm"),
    "collapse": ("layers",),
    "balance": (),
    "time": (),
    "rewind": (),
}
"""Group -> the only metrics of it that are sent."""
_HIDDEN = re.compile(r"(eval|test)/(load/(cv|flops_per_token|experts_per_token|reroute_rate)|class_accuracy/.*)")
_GROUP = re.compile(r"(train/load|parallel|spike|collapse|balance|time|rewind)/(.+)")


def select_names(point: Point) -> list[str]:
    """Return the metrics of a point that are sent: no parts of a metric, such as those of each domain or expert."""
    names = [name for name in point.metrics if _is_shown(name) and not _is_part(name, point.metrics)]
    return names[:MAX_NAMES]


@lru_cache(maxsize=10_000)
def _is_shown(name: str) -> bool:
    match = _GROUP.fullmatch(name)
    return match[2] in _SHOWN[match[1]] if match else not _HIDDEN.fullmatch(name)


def _is_part(name: str, names: Collection[str]) -> bool:
    """Return whether another of the names is a prefix of this one, up to a slash; the quality out of domain is none."""
    parts = name.split("/")
    if parts[-1] == OUT_OF_DOMAIN and "load" not in parts:
        return False
    return any("/".join(parts[:length]) in names for length in range(1, len(parts)))
