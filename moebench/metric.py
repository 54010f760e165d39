"""What is declared of a metric that runs record or tables show."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Direction = Literal["lower", "higher", "neither"]
Format = Literal["number", "signed", "count", "percent", "whole percent", "p", ".0f", ".1f", ".2f", ".3f"]
"""How tables write a value (see `moebench.reporting.metrics`)."""

VARIABLE = re.compile(r"[A-Z]{3,}")
"""A word in capitals is a placeholder for a name: `balance/NAME`."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, or a family of them whose name has a variable part."""

    name: str
    """As in result.json; in the journal and in MLflow one of `prefixes` may precede it."""
    header: str = ""
    """Column header; empty: no table shows it."""
    unit: str = ""
    format: Format = "number"
    better: Direction = "neither"
    meaning: str
    """One sentence."""
    prefixes: tuple[str, ...] = ()
    suffix: str = ""
    """Variable part that may follow the name after a slash."""

    def matches(self, recorded_name: str) -> bool:
        """Return whether this is the metric that a journal, a result or MLflow calls `recorded_name`."""
        return bool(self._pattern.fullmatch(recorded_name))

    @property
    def is_family(self) -> bool:
        """Whether the name has a variable part."""
        return bool(VARIABLE.search(self.name))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        prefix = f"(?:{'|'.join(self.prefixes)})?" if self.prefixes else ""
        return re.compile(prefix + VARIABLE.sub(".+", re.escape(self.name)) + ("(?:/.+)?" if self.suffix else ""))


@dataclass(frozen=True, kw_only=True)
class MetricGroup:
    """Metrics that are measured together."""

    title: str
    about: str
    """Where they are measured and recorded."""
    metrics: tuple[Metric, ...]
