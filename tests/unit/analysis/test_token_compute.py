"""Experts per token and their correlation with the loss under the dense arm: from finished runs to the report."""

from pathlib import Path

import numpy as np
import pytest
from support.training_cases import tiny_config, write_text

from moebench.analysis.token_compute.measure import measure_tokens
from moebench.analysis.token_compute.report import build_report, draw_report
from moebench.analysis.token_compute.runs import find_pairs
from moebench.config import cell_id
from moebench.experiment.arms import read_data_digest
from moebench.parallel.mesh import Mesh
from moebench.reporting.formatting import NumberText
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.recorder import RunRecorder
from moebench.schema import CellConfig
from moebench.training.callback import RunContext
from moebench.training.model import prepare_task
from moebench.training.train import select_device, train_cell


def train(config: CellConfig, results: Path) -> RunFolder:
    """Train a cell into a results folder, as the runner does."""
    digest = read_data_digest(config)
    cell = Cell(
        id=cell_id(config, digest),
        arm=config.router.name,
        seed=config.seed,
        config=config,
        varies={},
        plugins=(),
        data_digest=digest,
    )
    folder = RunFolder.of(results, cell.id)
    folder.write_cell(cell.to_dict("tiny"))
    with RunRecorder(folder) as recorder:
        context = RunContext(recorder=recorder, checkpoints=folder.checkpoints)
        mesh = Mesh(device=select_device(config.train))
        task = prepare_task(config, results)
        result = train_cell(config, task, context, cell_id=cell.id, arm=cell.arm, mesh=mesh)
    assert result is not None
    folder.write_result(result)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    text = write_text(folder)
    for router, seed in (("dynmoe", 0), ("dense", 0), ("dynmoe", 1), ("dynmoe", 2), ("dense", 2)):
        train(tiny_config(text, router=router, seed=seed, task={"eval_windows": 8}), folder)
    return folder


def find_id(results: Path, router: str, seed: int) -> str:
    for folder in sorted((results / "runs").iterdir()):
        cell = RunFolder(folder).read_cell()
        if (cell["arm"], cell["seed"]) == (router, seed):
            return folder.name
    raise AssertionError(router)


def test_seeds_are_paired_with_their_dense_runs(results: Path) -> None:
    pairs = find_pairs(results, find_id(results, "dynmoe", 1))
    seeds = [(pair.run.config.seed, pair.dense.config.seed if pair.dense else None) for pair in pairs]
    assert seeds == [(1, None), (0, 0), (2, 2)]  # the run that was asked for comes first


def test_counts_equal_those_of_the_result(results: Path) -> None:
    pair = find_pairs(results, find_id(results, "dynmoe", 0))[0]
    table = measure_tokens(pair, results)
    metrics = pair.run.folder.read_result().metrics  # type: ignore[union-attr]
    assert table.mean_count.mean() == pytest.approx(metrics["load/experts_per_token"])
    assert pair.dense is not None
    assert table.dense_loss is not None
    dense = pair.dense.folder.read_result().metrics  # type: ignore[union-attr]
    for loss_N, bits in ((table.own_loss, metrics["bits_per_byte"]), (table.dense_loss, dense["bits_per_byte"])):
        assert loss_N.mean() / np.log(2) == pytest.approx(bits, rel=1e-5)  # one byte is one token
    assert len(np.unique(table.sequence)) * 8 == len(table.sequence)


def test_the_number_of_tokens_is_chosen(results: Path) -> None:
    pair = find_pairs(results, find_id(results, "dynmoe", 0))[0]
    every, part = measure_tokens(pair, results), measure_tokens(pair, results, max_tokens=1)
    assert 0 < len(part.sequence) < len(every.sequence)  # one batch


def test_report_and_figure(results: Path, tmp_path: Path) -> None:
    pairs = find_pairs(results, find_id(results, "dynmoe", 0))
    tables = {pair.run.config.seed: measure_tokens(pair, results) for pair in pairs}
    report = build_report("dynmoe", tables)
    assert [table.title.split(":")[0] for table in report.tables] == [
        "Experts per token on the test split",
        "Spearman's correlation of experts per token with difficulty",
        "The same over the seeds of dynmoe, mean over layers, 95 % t interval",
    ]
    for row in report.tables[0].rows:  # the columns from "0" to "5 or more" have every token once
        assert sum(cell.value for cell in row[3:] if isinstance(cell, NumberText)) == pytest.approx(1.0)
    layers = report.values["layers"]
    assert list(layers) == ["0", "1", "all, mean"]
    assert sum(layers["0"]["histogram"].values()) == len(tables[0].own_loss)
    for layer in layers.values():  # of all layers too: rounding the mean of each token would not give the mean
        pairs_of_count = layer["histogram"].items()
        num_pairs = sum(layer["histogram"].values())
        assert sum(int(count) * n for count, n in pairs_of_count) / num_pairs == pytest.approx(layer["mean"])
    low, high = layers["0"]["spearman_dense_loss"]["interval"]
    assert low <= layers["0"]["spearman_dense_loss"]["value"] <= high
    assert set(report.values["seeds"]["loss under the dense arm"]["by_seed"]) == {"0", "2"}
    assert set(report.values["seeds"]["loss under the arm itself"]["by_seed"]) == {"0", "1", "2"}
    assert draw_report("dynmoe", 0, tables[0], tmp_path / "compute.png").stat().st_size > 3000
