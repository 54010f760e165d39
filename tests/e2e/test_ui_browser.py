"""MLflow's UI of a results folder, in a real browser, shows the experiment."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from support.run_folders import write_result

from moebench.runs.journal import Journal
from moebench.tracking.address import default_uri
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.replay import replay

SCRIPT = Path(__file__).parents[2] / "scripts" / "screenshot_ui.py"
CELLS = {"a00000000001": ("switch", 0), "a00000000002": ("dense", 0)}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshot_ui", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(results: Path) -> None:
    for cell, (arm, seed) in CELLS.items():
        folder = results / "runs" / cell
        folder.mkdir(parents=True)
        content = {"id": cell, "arm": arm, "seed": seed, "config": {}, "experiment": "quickstart"}
        content |= {"data": {"name": "shakespeare", "digest": "9f"}, "varies": {"router.name": arm}}
        (folder / "cell.json").write_text(json.dumps(content))
        with Journal(folder / "journal.jsonl") as journal:
            for step in range(1, 41):
                loss = 1 + math.exp(-step / 9)
                journal.append(step, {"loss/task": loss, "eval/bits_per_byte": 2 / step})
        result = {"status": "done", "error": None, "step": 40, "metrics": {"bits_per_byte": 2.0}}
        write_result(folder, **result)
        draw(folder / "load.png")


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=100)
    axes.bar(["expert 0", "expert 1", "expert 2"], [5, 2, 3])
    axes.set_title("Load of layer 1")
    figure.savefig(path)
    pyplot.close(figure)


@pytest.mark.slow
def test_experiment_child_runs_charts_and_load_figure_are_visible(tmp_path: Path) -> None:
    screenshots = load_script()
    if screenshots.find_chromium() is None:
        pytest.skip("no chromium with chromedriver on this machine (Debian: apt-get install chromium-driver)")
    build(tmp_path)
    replay(tmp_path, default_uri(tmp_path))
    with silence_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(default_uri(tmp_path))
        number = client.get_experiment_by_name("quickstart").experiment_id
        run = client.search_runs([number], "tags.`moebench.arm` = 'switch'")[0].info.run_id
    children = ("switch seed 0", "dense seed 0")
    with screenshots.serve_pages(tmp_path) as url, screenshots.browser() as driver:
        screenshots.open_page(driver, f"{url}/#/experiments", ("quickstart",))
        driver.save_screenshot(str(tmp_path / "experiments.png"))
        assert screenshots.show_charts(driver, url, number, "quickstart", children) >= 2
        text = driver.execute_script("return document.body.innerText")
        assert all(word in text for word in ("quickstart", *children, "loss/task", "eval/bits_per_byte"))
        # A chart is drawn when it has a path for each run that has the metric.
        lines = "return document.querySelectorAll('.js-plotly-plot .scatterlayer path').length"
        assert driver.execute_script(lines) >= len(children)
        driver.save_screenshot(str(tmp_path / "charts.png"))
        width, height = screenshots.show_figure(driver, url, number, run, "load.png")
        # 5 x 3 inches: the proportions do not depend on the zoom.
        assert width / height == pytest.approx(5 / 3, rel=0.05)
        driver.save_screenshot(str(tmp_path / "load.png"))
    sizes = [(tmp_path / name).stat().st_size for name in ("experiments.png", "charts.png", "load.png")]
    assert min(sizes) > 20_000
