"""Metrics over domains: weighted means, and names that trackers accept."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OUT_OF_DOMAIN = "out_of_domain"
"""Suffix of metrics over the domains that are held out of training."""


def average_by_domain(
    name: str, sum_D: "Tensor", weight_D: "Tensor", domains: Sequence[str], num_held_out: int = 0
) -> dict[str, float]:
    """Return weighted means: `name` over the trained domains, and `name/DOMAIN` for each domain with any weight.

    If held-out domains, the last `num_held_out`, have any weight, `name/out_of_domain` is the mean over them.
    """

    def mean(part: slice) -> float:
        return (sum_D[part].sum() / weight_D[part].sum().clamp(min=1)).item()

    num_trained = len(domains) - num_held_out
    metrics = {name: mean(slice(num_trained))}
    if weight_D[num_trained:].any():
        metrics[f"{name}/{OUT_OF_DOMAIN}"] = mean(slice(num_trained, None))
    parts = zip(metric_names(tuple(domains)), sum_D.tolist(), weight_D.tolist(), strict=True)
    # By weight: of very many domains a tracker gets the first.
    for domain, value, weight in sorted(parts, key=lambda part: -part[2]):
        if weight:
            metrics[f"{name}/{domain}"] = value / weight
    return metrics


@lru_cache(maxsize=64)
def metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of domains or classes as parts of metric names, whose characters trackers restrict.

    Accents are dropped and other characters become `_`. Names that collide or become empty get their index appended.
    """
    plain = []
    for name in names:
        letters = unicodedata.normalize("NFKD", name)
        letters = "".join(c for c in letters if not unicodedata.combining(c))
        parts = [part.strip(" .") for part in re.sub(r"[^A-Za-z0-9_\-.:/ ]", "_", letters).split("/")]
        plain.append("/".join(part for part in parts if part)[:100].strip(" ./"))
    number = Counter(plain)
    return tuple(f"{name}_{i}" if number[name] > 1 or not name else name for i, name in enumerate(plain))
