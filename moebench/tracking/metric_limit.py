"""Limits on the metrics of a run in a tracker, which shows a chart for each; journals and results have all of them."""

from collections.abc import Mapping, Sequence

from moebench.runs.journal import Point

MAX_PARTS = 50
"""Metrics sent of one family, such as `eval/bits_per_byte/DOMAIN`: those of the domains with most data."""
MAX_NAMES = 2000
"""Metrics sent of one point."""


def select_names(point: Point) -> list[str]:
    """Return the metrics of a point that are sent: of each family the first `MAX_PARTS`, and `MAX_NAMES` in all.

    Tasks list domains by the size of their data, and every evaluation lists them in the same order.
    """
    if len(point.metrics) <= MAX_PARTS:
        return [*point.metrics]
    num_parts: dict[str, int] = {}
    names = []
    for name in point.metrics:
        family = _family(name, point.metrics)
        if family:
            num_parts[family] = num_parts.get(family, 0) + 1
        if num_parts.get(family, 0) <= MAX_PARTS:
            names.append(name)
    return names[:MAX_NAMES]


def describe_left_out(points: Sequence[Point]) -> str:
    """Return a line on metrics of the points that are not sent; empty if all are."""
    for point in points:
        names = select_names(point)
        if len(names) < len(point.metrics):
            left_out = next(name for name in point.metrics if name not in set(names))
            family = _family(left_out, point.metrics)
            number = sum(_family(name, point.metrics) == family for name in point.metrics)
            return (
                f"of {number} metrics such as {left_out} a tracker gets {MAX_PARTS}, those with most data; all are in"
                " the journal and in the tracker's table metrics.json"
            )
    return ""


def _family(name: str, metrics: Mapping[str, float]) -> str:
    """Return the metric that `name` is a part of, such as that over all domains; empty if it is none."""
    parts = name.split("/")
    prefixes = ("/".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in metrics), "")
