"""Alarms in short trainings of every router: those of layers that have collapsed, and no others."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from support.training_cases import Run, tiny_config

from moebench.experiment.files import PACKAGED
from moebench.runs.journal import read_journal
from moebench.runs.layer_series import LayerValues, iter_layer_series
from moebench.training.telemetry.collapse import WINDOW_STEPS

ROUTERS = yaml.safe_load((PACKAGED / "every_router.yaml").read_text())["grid"]["router"]
SIZES: dict[str, Any] = {
    "layout": {"n": 1, "num_experts": 8, "expert_width": 16},
    "task": {"sequence_length": 32, "eval_windows": 1},
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 16},
}
TRAIN = {"steps": 80, "batch_size": 8, "log_every": 5, "eval_every": 1000, "warmup_steps": 10, "learning_rate": 5e-3}
COLLAPSING = {"dselect_k", "mlp_top_k"}
"""Without a balance loss all tokens go to the same expert or two of a layer in this training."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation of this repository, as two domains."""
    pages = [page.read_text() for page in sorted((Path(__file__).parents[4] / "docs").glob("*.md"))]
    parts = [page[start : start + 1500] for page in pages for start in range(0, len(page), 1500)]
    file = tmp_path_factory.mktemp("text") / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": part, "domain": "ab"[n % 2]}) for n, part in enumerate(parts)))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_only_layers_that_collapse_give_an_alarm(text: Path, tmp_path: Path, router: str) -> None:
    config = tiny_config(text, router={"name": router}, train=TRAIN, allow_noncausal=True, seed=11, **SIZES)
    Run(config, tmp_path)()
    points, _ = read_journal(tmp_path / "journal.jsonl")
    series = list(iter_layer_series(tmp_path / "layers.jsonl"))
    alarms = [
        (point.step, name.split("/")[1]) for point in points for name in point.metrics if name.endswith("/expert")
    ]
    assert alarms or router not in COLLAPSING
    for step, layer in alarms:
        logged = [point.layers[layer] for point in series if step - 2 * WINDOW_STEPS < point.step <= step]
        assert fmean(map(measure_concentration, logged)) > 0.9


def measure_concentration(values: LayerValues) -> float:
    """Return the share of the tokens that the busiest expert takes, or of all assignments that the busiest two take."""
    return max(max(values.load) / values.tokens, sum(sorted(values.load)[-2:]) / values.assignments)
