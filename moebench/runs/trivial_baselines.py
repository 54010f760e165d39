"""The trivial baselines of an evaluation set as they are stored: in the cache, and in the record of an experiment."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean
from typing import Any

from moebench.runs.checked_json import Types, require_numbers, require_types
from moebench.runs.result import RunResult
from moebench.tasks.baselines.baseline import FORMAT, TrivialBaseline

BELOW_TRIVIAL = "below trivial baselines: a ranking at this size says little"
"""Mark of an experiment whose baseline arm does not beat the reference of its task."""
RECORD_KEY = "trivial_baselines"
"""Key in the record of an experiment: a list with an entry for each split."""
MAX_BASELINES, MAX_NAME, MAX_MEANING = 64, 100, 500
"""Largest number of baselines, and characters of a name and a meaning, in a file that is read."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What determines trivial baselines: data, evaluation and split; two runs with equal values share them."""

    task: str
    data_digest: str
    eval_digest: str
    split: str
    plugins: tuple[str, ...] = ()
    """Digests of the plug-ins of the arm, whose task may be one of them."""
    format: int = FORMAT

    @classmethod
    def of(cls, result: RunResult, split: str, plugins: Iterable[str]) -> "EvaluationSet":
        """Return the evaluation set of a finished run."""
        return cls(
            task=str(result.config.get("task", {}).get("name", "")),
            data_digest=result.data_digest,
            eval_digest=result.eval_digest,
            split=split,
            plugins=tuple(sorted(plugins)),
        )

    @property
    def key(self) -> str:
        """A hash of the fields, as a part of a folder's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class StoredBaselines:
    """The trivial baselines of one evaluation set; none where the task has none."""

    evaluation: EvaluationSet
    metric: str
    """The metric that arms are compared by."""
    lower_is_better: bool
    baselines: tuple[TrivialBaseline, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        facts = {"metric": self.metric, "lower_is_better": self.lower_is_better}
        return {**asdict(self.evaluation), **facts, "baselines": [asdict(baseline) for baseline in self.baselines]}

    @classmethod
    def from_dict(cls, values: Any) -> "StoredBaselines":
        """Rebuild the value of `to_dict`; raise ValueError where it is damaged."""
        texts = ("task", "data_digest", "eval_digest", "split")
        if not isinstance(values, Mapping):
            raise ValueError("trivial baselines are not an object")
        types: dict[str, Types] = {**dict.fromkeys((*texts, "metric"), str), "lower_is_better": bool}
        require_types(values, {**types, "plugins": (list, tuple), "format": int, "baselines": list})
        if len(values["baselines"]) > MAX_BASELINES:
            raise ValueError(f"{len(values['baselines'])} trivial baselines (allowed: at most {MAX_BASELINES})")
        return cls(
            evaluation=EvaluationSet(
                **{name: values[name] for name in texts},
                plugins=tuple(str(digest) for digest in values["plugins"]),
                format=values["format"],
            ),
            metric=values["metric"],
            lower_is_better=values["lower_is_better"],
            baselines=tuple(_read_baseline(entry) for entry in values["baselines"]),
        )


def find_reference(baselines: Iterable[TrivialBaseline], metric: str) -> TrivialBaseline | None:
    """Return the baseline that the baseline arm must beat; None if there is none with the metric."""
    return next((each for each in baselines if each.is_reference and metric in each.values), None)


def is_below_trivial(
    mean: float | None, baselines: Iterable[TrivialBaseline], metric: str, *, lower_is_better: bool
) -> bool | None:
    """Return whether a mean over seeds does not beat the reference; None where either is unknown."""
    reference = find_reference(baselines, metric)
    if mean is None or reference is None:
        return None
    return mean >= reference.values[metric] if lower_is_better else mean <= reference.values[metric]


def average_arm(results: Iterable[RunResult], arm: str, metric: str, split: str = "test") -> float | None:
    """Return the mean of the metric over the finished runs of an arm; None without one."""
    finished = [result for result in results if result.arm == arm and result.status == "done"]
    values = [(result.metrics if split == "test" else result.validation).get(metric) for result in finished]
    numbers = [value for value in values if value is not None and isfinite(value)]
    return fmean(numbers) if numbers else None


def read_recorded(record: Mapping[str, Any]) -> list[StoredBaselines]:
    """Return the trivial baselines in the record of an experiment, without damaged entries: they can be computed."""
    entries = record.get(RECORD_KEY)
    recorded = []
    for entry in entries if isinstance(entries, list) else ():
        try:
            recorded.append(StoredBaselines.from_dict(entry))
        except (ValueError, TypeError):
            continue
    return recorded


def _read_baseline(values: Any) -> TrivialBaseline:
    if not isinstance(values, Mapping):
        raise ValueError("a trivial baseline is not an object")
    require_types(values, {"name": str, "meaning": str, "values": dict, "is_reference": bool})
    require_numbers(values, "values")
    if not 0 < len(values["name"]) <= MAX_NAME or len(values["meaning"]) > MAX_MEANING:
        raise ValueError("a trivial baseline has no name, or one that is too long")
    if not all(isfinite(value) for value in values["values"].values()):
        raise ValueError("a trivial baseline is not a finite number")
    names = ("name", "meaning", "values", "is_reference")
    return TrivialBaseline(**{name: values[name] for name in names})
