"""MLflow's UI of a results folder, in a real browser, shows the experiment."""

import json
import math
import urllib.request
from pathlib import Path

import pytest
from support.browser import load_script
from support.run_folders import write_cell, write_result

from moebench.analysis.compare.summary import refresh_summaries
from moebench.runs.journal import Journal
from moebench.tracking.address import default_uri
from moebench.tracking.bookkeeping import CELL
from moebench.tracking.mlflow_store import MlflowStore
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.replay import replay
from moebench.tracking.stored_runs import EXPERIMENT
from moebench.tracking.ui import list_links

ARMS, SEEDS = ("switch", "dense"), (0, 1, 2)


def build(results: Path) -> None:
    cells = [{"arm": arm, "seed": seed} for seed in SEEDS for arm in ARMS]
    for index, cell in enumerate(cells, 1):
        cell["id"] = f"a{index:011}"
        folder, arm, seed = results / "runs" / str(cell["id"]), str(cell["arm"]), int(str(cell["seed"]))
        config = {"router": {"name": arm}, "layout": {"name": "every_n"}, "model": {"d_model": 32}}
        config |= {"task": {"name": "language"}}
        varies, data = {"router.name": arm, "seed": seed}, {"name": "language", "digest": "9f"}
        facts = {"arm": arm, "seed": seed, "experiment": "quickstart", "config": config, "varies": varies, "data": data}
        write_cell(folder, **facts, family="token choice")
        offset = 0.01 * seed + (0.05 if arm == "dense" else 0.0)
        with Journal(folder / "journal.jsonl") as journal:
            for step in range(1, 41):
                journal.append(step, {"loss/task": 1 + math.exp(-step / 9) + offset, "system/cpu_percent": 50.0 + step})
                if step % 10 == 0:
                    journal.append(step, {"eval/bits_per_byte": 2 + 2 / step + offset})
            journal.append(40, {"test/bits_per_byte": 2.02 + offset})
        cost = {"train_flops_per_token": 1e5, "train_tokens": 1e3, "total_params": 1e6}
        numbers = {"metrics": {"bits_per_byte": 2.02 + offset}, "cost": cost, "throughput": {"tokens_per_s": 1e3}}
        write_result(folder, step=40, arm=arm, seed=seed, config=config, **numbers)
        draw(folder / "load.png")
    record = {"name": "quickstart", "question": "Does switch beat dense?", "baseline": "dense", "cells": cells}
    (results / "experiments").mkdir()
    (results / "experiments" / "quickstart.json").write_text(json.dumps(record))


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=100)
    axes.bar(["expert 0", "expert 1", "expert 2"], [5, 2, 3])
    axes.set_title("Load of layer 1")
    figure.savefig(path)
    pyplot.close(figure)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment of two arms and three seeds, with its report; one that was stopped; one that failed."""
    results = tmp_path_factory.mktemp("results")
    build(results)
    for name in ("stopped", "failed"):
        folder = results / "runs" / f"{name:0<12}"
        write_cell(folder, arm="switch", experiment=name)
        with Journal(folder / "journal.jsonl") as journal:
            journal.append(1, {"loss/task": 2.0})
    write_result(results / "runs" / f"{'failed':0<12}", status="failed", error="loss is not finite at step 2")
    refresh_summaries(results)
    report = "<!doctype html><h1>Report on quickstart</h1><svg width=300 height=100><rect width=300 height=90 /></svg>"
    (results / "experiments" / "quickstart" / "report.html").write_text(report)
    replay(results, default_uri(results))
    return results


@pytest.mark.slow
def test_what_a_reader_looks_for_is_visible(results: Path, tmp_path: Path) -> None:
    pages = load_script()
    if pages.find_chromium() is None:
        pytest.skip("no chromium with chromedriver on this machine (Debian: apt-get install chromium-driver)")
    runs = {run.tags[CELL]: run.id for run in MlflowStore(default_uri(results), "quickstart").runs()}
    with silence_mlflow():
        from mlflow import MlflowClient

        experiments = MlflowClient(default_uri(results)).search_experiments()
    numbers = {experiment.name: experiment.experiment_id for experiment in experiments}
    number, parent, run = numbers["quickstart"], runs[EXPERIMENT], runs["a00000000001"]
    with pages.serve_pages(results) as url, pages.open_browser() as driver:

        def read_text(name: str) -> str:
            driver.save_screenshot(str(tmp_path / f"{name}.png"))
            assert (tmp_path / f"{name}.png").stat().st_size > 20_000  # not blank
            return str(driver.execute_script("return document.body.innerText"))

        pages.show_view(driver, url, number, is_chart=True, texts=("Curves", "Group: dense", "Group: switch"))
        text = read_text("charts")
        assert all(part in text for part in ("Does switch beat dense?", "eval/bits_per_byte", "loss/task"))
        # A line for each of the two groups in each of two charts.
        assert driver.execute_script(f"return document.querySelectorAll({pages.LINES!r}).length") >= 4
        pages.show_view(driver, url, number, is_chart=False, texts=("Group: dense", "Group: switch"))
        assert all(
            part in read_text("table") for part in ("switch seed 2", "router.name", "test/bits_per_byte", "2.03")
        )
        pages.show_run(driver, url, number, parent, ("Description", "mean/switch"))
        pages.unfold_description(driver)
        text = read_text("experiment")
        assert all(part in text for part in ("switch", "By router", "verdict", "progress", "6 of 6 done"))
        assert "moebench" not in text.split("Tags")[1]  # what is for the sender's own use is not shown
        pages.show_run(driver, url, number, parent, ("comparison.json", "verdict"), "artifacts/comparison.json")
        assert all(part in read_text("comparison") for part in ("dense", "baseline", "minus dense"))
        pages.show_run(driver, url, number, parent, ("report.html",), "artifacts/report.html")
        assert "Report on quickstart" in pages.read_frame(driver)
        pages.show_run(driver, url, number, run, ("model.d_model", "language (9f)", "switch"))
        assert all(part in read_text("run") for part in ("every_n", "token choice", "Parameters"))
        pages.show_run(driver, url, number, run, ("eval", "bits_per_byte"), "model-metrics")
        pages.wait_for(driver, f"return document.querySelectorAll({pages.LINES!r}).length >= 2", "the curves of a run")
        pages.show_run(driver, url, number, run, ("cpu_percent",), "system-metrics")
        width, height = pages.show_figure(driver, url, number, run, "load.png")
        # 5 x 3 inches: the proportions do not depend on the zoom.
        assert width / height == pytest.approx(5 / 3, rel=0.05)
        for name in ("stopped", "failed"):
            pages.open_page(driver, pages.build_link(url, numbers[name], ""), (name, "2 matching runs"))


@pytest.mark.slow
def test_an_empty_store_has_pages_too(tmp_path: Path) -> None:
    MlflowStore(default_uri(tmp_path), "empty")
    with load_script().serve_pages(tmp_path) as url, urllib.request.urlopen(f"{url}/health") as response:
        assert response.status == 200
    assert list_links(tmp_path, None, url) == {}
