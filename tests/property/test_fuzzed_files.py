"""A file that others may have written, with any bytes changed: read, or refused in one line by its reader's errors."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tracked_runs import build_cell, write_final_files, write_steps

from moebench.errors import UsageError
from moebench.experiment.grid import expand
from moebench.experiment.seed_plan import PlanEntry, SeedPlan, read_seed_plan
from moebench.parallel.checkpoint import VerifiedCheckpointIO, checkpoint_path
from moebench.parallel.manifest import Manifest
from moebench.parallel.safe_reader import read_metadata
from moebench.runs.checked_json import add_checksum, read_json
from moebench.runs.experiment_record import read_record
from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.layer_series import LayerValues, format_layer_line, read_layer_series
from moebench.runs.recorder import read_loads
from moebench.training.label_tables import read_label_tables

EXPERIMENT = """
question: Does it run?
base: &base
  task: {name: clustered}
  layout: {name: every_n, n: 1, num_experts: 4}
  train: {steps: 20, warmup_steps: 0x5, learning_rate: 5.0e-3}
grid:
  arm:
    - {label: "dense", router: dense}
    - {<<: {router: switch}, label: 'half', router.losses: {load_balance: .5}}
    - label: |
        folded
      router: {name: top_k, top_k: 2}
seeds: [0, 1]
"""
LABELS = {"kinds": {"domain": {"values": ["a", "b"], "layers": {"1": [[1.0, 2.0], [3.0, 4.0]]}}}}
COUNTS = {"tokens": 4, "dropped": 0, "rerouted": 0, "unserved": 0, "experts_per_token": 1.0, "flops_per_token": 1e3}
INTERESTING = (b"", b"\0", b"\xff", b"[", b"{", b'"', b"1e999", b"-1", b"null", b"\xed\xa0\x80", b"9" * 400, b"NaN")
LONG_FUZZ = int(os.environ.get("MOEBENCH_FUZZ_EXAMPLES", "1500"))
"""Examples of each reader in `make test-all`: some minutes for all."""

# A place in the file, how many bytes go, and what comes in their place.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(INTERESTING) | st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="moebench-fuzz-"))


ENTRY = PlanEntry(time=1.0, seeds=(0, 1, 2), final_seeds=(0, 1, 2, 3), num_finished=0)
PLAN = SeedPlan(entries=(ENTRY,), added={"switch": (3,)})


@cache
def build_run() -> RunFolder:
    """Write a run with every file that a run may have."""
    cell = {"id": "0" * 12, "arm": "switch", "seed": 0}
    path = build_cell(scratch(), "quickstart", cell)
    write_steps(path, 1, 12)
    folder = RunFolder(path)
    write_final_files(path)
    folder.write_cell(folder.read_cell())
    folder.write_result(folder.read_result())  # type: ignore[arg-type]
    folder.labels.write_text(json.dumps(LABELS))
    layers = {"1": LayerValues(load=(3, 1), entropy=0.5, logit_max=2.0, logit_std=1.0, **COUNTS)}
    folder.layers.write_bytes(b"".join(format_layer_line(step, layers) + b"\n" for step in (1, 20)))
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(3, dtype=torch.bfloat16)}
    content = {"step": 3, "state_dict": weights, "optimizer_states": [{"state.w": -weights["w"]}]}
    fields = {"cell": "0" * 12, "records": {"journal.jsonl": {"bytes": 7, "sha256": "0" * 64}}}
    VerifiedCheckpointIO().save_checkpoint(content, checkpoint_path(folder.checkpoints, 3), fields)
    record = {"name": "quickstart", "question": "?", "cells": [cell], "baseline": "switch"}
    record["seed_plans"] = {"k": PLAN.to_dict()}
    (scratch() / "experiments").mkdir()
    (scratch() / "experiments" / "quickstart.json").write_text(json.dumps(record))
    experiment_file(folder).write_text(EXPERIMENT)
    return folder


def metadata_file(folder: RunFolder) -> Path:
    return checkpoint_path(folder.checkpoints, 3) / ".metadata"


def manifest_file(folder: RunFolder) -> Path:
    return checkpoint_path(folder.checkpoints, 3).with_suffix(".json")


def record_file(folder: RunFolder) -> Path:
    return scratch() / "experiments" / "quickstart.json"


def experiment_file(folder: RunFolder) -> Path:
    return scratch() / "fuzzed.yaml"


Reader = tuple[Callable[[RunFolder], Path], Callable[[RunFolder], Any], tuple[type[Exception], ...]]
READERS: dict[str, Reader] = {
    "manifest": (manifest_file, lambda run: Manifest.read(manifest_file(run)), (ValueError, OSError)),
    "metadata": (metadata_file, lambda run: read_metadata(metadata_file(run).parent), (UsageError,)),
    "cell": (lambda run: run.cell, lambda run: run.read_cell(), (UsageError,)),
    "result": (lambda run: run.result, lambda run: run.read_result(), (UsageError,)),
    "json": (lambda run: run.environment, lambda run: read_json(run.environment), (UsageError,)),
    "journal": (lambda run: run.journal, lambda run: read_journal(run.journal), (UsageError,)),
    "loads": (lambda run: run.loads, lambda run: read_loads(run.loads), (UsageError,)),
    "layers": (lambda run: run.layers, lambda run: read_layer_series(run.layers), (UsageError,)),
    "labels": (lambda run: run.labels, lambda run: read_label_tables(run.labels), (UsageError,)),
    "record": (record_file, lambda run: read_seed_plan(read_record(record_file(run)), "k"), (UsageError,)),
    "experiment": (experiment_file, lambda run: expand(experiment_file(run)), (UsageError,)),
}


def apply_edits(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, length, inserted in edits:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start + length :]
    return content


def require_one_line(name: str, content: bytes) -> None:
    """Read a file with other content: it is accepted, or refused in one line by the errors of its reader."""
    folder = build_run()
    file_of, read, errors = READERS[name]
    file = file_of(folder)
    original = file.read_bytes()
    try:
        file.write_bytes(content)
        read(folder)
        message = "accepted"
    except errors as error:
        message = str(error)
    finally:
        file.write_bytes(original)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000


@pytest.mark.parametrize("name", READERS)
@given(edits=EDITS)
def test_changed_bytes(name: str, edits: list[tuple[float, int, bytes]]) -> None:
    require_one_line(name, apply_edits(READERS[name][0](build_run()).read_bytes(), edits))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=LONG_FUZZ, suppress_health_check=list(HealthCheck))
@given(edits=EDITS)
def test_changed_bytes_for_minutes(name: str, edits: list[tuple[float, int, bytes]]) -> None:
    require_one_line(name, apply_edits(READERS[name][0](build_run()).read_bytes(), edits))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
JSON_FILES = ("manifest", "cell", "result", "labels", "record")


def replace_value(values: Any, path: list[int], value: Any) -> Any:
    """Return JSON with another value at some place: each number chooses an entry on the way."""
    if not path or not values or not isinstance(values, dict | list):
        return value
    keys = list(values) if isinstance(values, dict) else range(len(values))
    key = keys[path[0] % len(keys)]
    copy: Any = values.copy()
    copy[key] = replace_value(values[key], path[1:], value)
    return copy


def require_one_line_for_value(name: str, path: list[int], value: Any) -> None:
    """Read a file with another value at some place, with and without a right checksum."""
    values = json.loads(READERS[name][0](build_run()).read_bytes())
    changed = replace_value(values, path, value)
    require_one_line(name, json.dumps(changed).encode())
    if isinstance(changed, dict):
        require_one_line(name, json.dumps(add_checksum(changed)).encode())


PATHS = st.lists(st.integers(0, 30), max_size=4)


@pytest.mark.parametrize("name", JSON_FILES)
@given(path=PATHS, value=VALUES)
def test_changed_values(name: str, path: list[int], value: Any) -> None:
    require_one_line_for_value(name, path, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
@settings(max_examples=LONG_FUZZ // 2, suppress_health_check=list(HealthCheck))
@given(path=PATHS, value=VALUES)
def test_changed_values_for_minutes(name: str, path: list[int], value: Any) -> None:
    require_one_line_for_value(name, path, value)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[" * 100_000, b"{" * 9, b'{"a": ' * 100_000, b"\x80\x04."])
def test_whole_files(name: str, content: bytes) -> None:
    require_one_line(name, content)
