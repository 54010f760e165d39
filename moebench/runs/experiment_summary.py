"""What an experiment has shown, as a file beside its record: verdict sentences, tables, the mean of each arm.

`analysis` writes it, `tracking` sends it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import is_plain_name, parse_json, read_plain_file
from moebench.runs.checked_json import Types, add_checksum, pop_checksum, require_types
from moebench.runs.folder import write_json

FORMAT = 1
SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
"""In the folder of the experiment: the summary, and the report if one was built."""
MAX_BYTES, MAX_ARMS, MAX_TABLES, MAX_ROWS, MAX_COLUMNS, MAX_TEXT = 4 * 2**20, 1000, 50, 2000, 100, 2000
"""Limits on a file that is read."""


@dataclass(frozen=True, kw_only=True)
class ArmMean:
    """An arm over its finished seeds, in the unit of the metric."""

    mean: float | None = None
    difference: float | None = None
    """Minus the baseline, over common seeds; None for the baseline."""


@dataclass(frozen=True, kw_only=True)
class SummaryTable:
    """A table of text cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ExperimentSummary:
    """The comparison of an experiment, as far as other programs show it."""

    metric: str
    split: str
    baseline: str
    num_done: int
    """Finished cells that it is computed from."""
    sentences: tuple[str, ...]
    """The verdict on each arm, and warnings."""
    arms: Mapping[str, ArmMean]
    tables: tuple[SummaryTable, ...]
    """The first one is that of quality."""
    results_digest: str = ""
    """`digest_results` before the comparison; empty in summaries of earlier versions."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> "ExperimentSummary":
        """Rebuild the value of `to_dict`; raise ValueError where it is damaged or too large."""
        if not isinstance(values, Mapping):
            raise ValueError("it is no object")
        types: dict[str, Types] = {**dict.fromkeys(("metric", "split", "baseline"), str), "num_done": int}
        require_types(values, {**types, "format": int, "sentences": list, "arms": dict, "tables": list})
        if values["format"] != FORMAT:
            raise ValueError(f"'format' is {values['format']}, expected {FORMAT}")
        require_types(values, {"results_digest": str}, optional=("results_digest",))
        return cls(
            **{name: values[name] for name in types},
            results_digest=values.get("results_digest", "")[:MAX_TEXT],
            sentences=_read_texts(values["sentences"], "sentences", MAX_ROWS),
            arms={name: _read_arm(arm) for name, arm in _limit(values["arms"], "arms", MAX_ARMS).items()},
            tables=tuple(_read_table(table) for table in _limit(values["tables"], "tables", MAX_TABLES)),
        )


def _limit(values: Any, name: str, limit: int) -> Any:
    if len(values) > limit:
        raise ValueError(f"'{name}' has {len(values)} entries (allowed: at most {limit})")
    return values


def _read_texts(values: Any, name: str, limit: int) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"'{name}' must be a list of texts")
    return tuple(text[:MAX_TEXT] for text in _limit(values, name, limit))


def _read_arm(values: Any) -> ArmMean:
    if not isinstance(values, Mapping):
        raise ValueError("an arm is not an object")
    numbers = {name: values.get(name) for name in ("mean", "difference")}
    for name, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number)
        if number is not None and not is_number:
            raise ValueError(f"'{name}' of an arm is {str(number)[:40]!r}, expected a finite number or null")
    return ArmMean(**numbers)


def _read_table(values: Any) -> SummaryTable:
    if not isinstance(values, Mapping):
        raise ValueError("a table is not an object")
    require_types(values, {"title": str, "columns": list, "rows": list})
    columns = _read_texts(values["columns"], "columns", MAX_COLUMNS)
    rows = tuple(_read_texts(row, "rows", MAX_COLUMNS) for row in _limit(values["rows"], "rows", MAX_ROWS))
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"the table '{values['title'][:40]}' has rows of another length than its columns")
    return SummaryTable(title=values["title"][:MAX_TEXT], columns=columns, rows=rows)


def summary_path(results: Path, experiment: str) -> Path:
    """Return where the summary of an experiment is stored."""
    return results / "experiments" / experiment / SUMMARY_FILE


def digest_results(results: Path, cells: Iterable[Mapping[str, Any]]) -> str:
    """Return a SHA-256 (hex) of the results of cells as they are now. Times would not tell where a clock was set."""
    digest = hashlib.sha256()
    for cell_id in sorted({cell["id"] for cell in cells}):
        try:
            content = read_plain_file(results / "runs" / cell_id / "result.json")
        except OSError:  # not finished, or damaged
            content = b""
        digest.update(f"{cell_id} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def write_summary(results: Path, experiment: str, summary: ExperimentSummary) -> None:
    """Write the summary of an experiment; raise OSError where that is not possible."""
    path = summary_path(results, experiment)
    path.parent.mkdir(exist_ok=True)
    write_json(path, add_checksum(summary.to_dict()))


def _require_unchanged(values: Any) -> Any:
    return pop_checksum(values) if isinstance(values, Mapping) else values


def read_summary(results: Path, experiment: str) -> ExperimentSummary | None:
    """Return the summary of an experiment, None if there is none; raise UsageError for a damaged one."""
    path = summary_path(results, experiment)
    if not is_plain_name(experiment):
        return None
    try:
        return ExperimentSummary.from_dict(_require_unchanged(parse_json(read_plain_file(path, MAX_BYTES))))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: damaged ({text}); delete it, `moebench sync` writes it again") from error
