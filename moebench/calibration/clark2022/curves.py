"""Read the published loss curves: a CSV file, compressed or not, with a row for each evaluation of each run."""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebench.analysis.scaling.fit import Points
from moebench.errors import UsageError
from moebench.file_access import read_plain_file

SOURCE = "data/curves.csv.gz of https://github.com/google-deepmind/scaling_laws_for_routing"
MAX_BYTES = 64 * 2**20
"""Largest size of the file, compressed or not; the published one has 0.3 and 1.5 MiB."""
NUMBERS = (
    "step",
    "seed",
    "num_experts",
    "k",
    "routing_frequency",
    "flop_increase",
    "dense_parameter_count",
    "loss_validation",
)
"""Columns of numbers that are read."""
TEXTS = ("hyper_id", "router_type")
POSITIVE = ("num_experts", "dense_parameter_count", "loss_validation")
DENSE = "Dense"
SELECTED = {"k": 1.0, "routing_frequency": 0.5, "flop_increase": 1.0, "seed": 42.0}
"""The runs of table 3: one expert for each token, in every second block, one seed."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row."""

    run: str
    router: str
    numbers: Mapping[str, float]


def read_curves(path: Path) -> list[Evaluation]:
    """Return the last evaluation of each run; raise UsageError for a file that is not such a table."""
    last: dict[str, Evaluation] = {}
    for row in _read_rows(path):
        previous = last.get(row.run)
        if previous is None or row.numbers["step"] > previous.numbers["step"]:
            last[row.run] = row
    return list(last.values())


def select_points(evaluations: list[Evaluation], router: str) -> Points:
    """Return the runs of table 3 of one router, and the dense models as those with one expert."""
    selected = [
        row.numbers
        for row in evaluations
        if row.router in (router, DENSE) and all(row.numbers[key] == value for key, value in SELECTED.items())
    ]
    columns = ("dense_parameter_count", "num_experts", "loss_validation")
    num_params_M, num_experts_M, loss_M = (np.array([row[column] for row in selected]) for column in columns)
    return Points(num_params_M=num_params_M, num_experts_M=num_experts_M, loss_M=loss_M, size_M=num_params_M)


def _read_rows(path: Path) -> Iterator[Evaluation]:
    rows = csv.DictReader(io.StringIO(_read_text(path)))
    try:
        missing = [column for column in (*NUMBERS, *TEXTS) if column not in (rows.fieldnames or ())]
        if missing:
            raise UsageError(f"{path}: has no column {', '.join(missing)}; expected {SOURCE}")
        for line, row in enumerate(rows, 2):
            if row["loss_validation"] == "":  # an evaluation on the other data alone
                continue
            yield _read_row(row, f"{path}: line {line}")
    except csv.Error as error:
        raise UsageError(f"{path}: is not a CSV file ({error}); expected {SOURCE}") from error


def _read_row(row: Mapping[str, str | None], where: str) -> Evaluation:
    numbers = {}
    for column in NUMBERS:
        text = row[column] or ""
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (column in POSITIVE and number <= 0):
            allowed = "a number above 0" if column in POSITIVE else "a number"
            raise UsageError(f"{where}: {column} must be {allowed}, got '{text[:40]}'")
        numbers[column] = number
    return Evaluation(run=row["hyper_id"] or "", router=row["router_type"] or "", numbers=numbers)


def _read_text(path: Path) -> str:
    """Return the text of a file that may be compressed; raise UsageError if it cannot be read or is too large."""
    try:
        content = read_plain_file(path, MAX_BYTES)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError(f"{path}: decompresses to more than {MAX_BYTES // 2**20} MiB; expected {SOURCE}")
        return content.decode()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); expected {SOURCE}") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is damaged ({' '.join(str(error).split())[:100]}); expected {SOURCE}") from error
