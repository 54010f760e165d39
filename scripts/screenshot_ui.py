"""Take screenshots of the MLflow pages of a results folder for the documentation.

    python scripts/screenshot_ui.py RESULTS FOLDER [EXPERIMENT]

Writes mlflow.png (curves grouped by router), mlflow-table.png (the runs in groups), mlflow-experiment.png (the run of
the experiment, with the verdicts), mlflow-comparison.png (its table of the comparison), mlflow-run.png (the curves of
one run), mlflow-load.png (its load figure) and, if there is one, mlflow-report.png. Requires chromium and chromedriver.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moebench.runs.experiment_summary import REPORT_FILE
from moebench.tracking.address import default_uri
from moebench.tracking.bookkeeping import CELL
from moebench.tracking.experiment_run import TABLE
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.stored_runs import EXPERIMENT
from moebench.tracking.views import BY_ROUTER, build_link

LINES = ".js-plotly-plot .scatterlayer path.js-line"
"""The lines of the charts of a page."""

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1600,1000",
)


def find_chromium() -> str | None:
    """Return the path of the browser; None if it or its driver is missing."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return path if shutil.which("chromedriver") else None


@contextmanager
def open_browser() -> Iterator[Any]:
    """Open a headless browser with a temporary profile, which records requests and messages."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(find_chromium())
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.set_page_load_timeout(60)
            yield driver
        finally:
            driver.quit()


def wait_for(driver: Any, script: str, what: str, limit_s: float = 60) -> Any:
    """Run a script in the page until it returns a true value; raise TimeoutError naming `what` otherwise."""
    deadline = time.monotonic() + limit_s
    while not (value := driver.execute_script(script)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear in {limit_s:g} s: {driver.current_url}")
        time.sleep(0.3)
    return value


def open_page(driver: Any, url: str, texts: tuple[str, ...]) -> None:
    """Open a page without the panel of the MLflow assistant, and wait until it shows every text."""
    driver.get(url)
    driver.execute_script(
        "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
        "localStorage.setItem('mlflow.assistant.autoOpenedOnFirstLoad_v1', 'true');"
        "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
    )
    driver.get("about:blank")
    driver.get(url)
    for text in texts:
        wait_for(driver, f"return document.body && document.body.innerText.includes({text!r})", repr(text))


def show_view(driver: Any, url: str, experiment_id: str, *, is_chart: bool, texts: tuple[str, ...]) -> None:
    """Open an experiment in the view that `moebench ui` links to: as charts, or as a table of runs in groups."""
    link = build_link(url, experiment_id, BY_ROUTER)
    open_page(driver, link if is_chart else link.replace("&compareRunsMode=CHART", ""), texts)
    if is_chart:
        wait_for(driver, f"return document.querySelectorAll({LINES!r}).length", "a curve")
    time.sleep(2)


def show_run(driver: Any, url: str, experiment_id: str, run_id: str, texts: tuple[str, ...], tab: str = "") -> None:
    """Open the page of a run, or one of its tabs."""
    page = f"{url}/#/experiments/{experiment_id}/runs/{run_id}{tab and '/'}{tab}?workflowType=machine_learning"
    open_page(driver, page, texts)
    time.sleep(2)


def unfold_description(driver: Any) -> None:
    """Show all of the description on the page of a run."""
    button = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Show more')"
    wait_for(driver, f"return {button}", "the button 'Show more'").click()
    time.sleep(1)


def read_frame(driver: Any) -> str:
    """Return the text of the HTML file that a page shows."""
    frame = wait_for(driver, "return document.querySelector('iframe')", "the frame of the report")
    driver.switch_to.frame(frame)
    try:
        return str(wait_for(driver, "return document.body && document.body.innerText.trim()", "text in the report"))
    finally:
        driver.switch_to.default_content()


def show_figure(driver: Any, url: str, experiment_id: str, run_id: str, name: str) -> tuple[int, int]:
    """Open a figure of a run and return its size in pixels."""
    show_run(driver, url, experiment_id, run_id, (name,), f"artifacts/{name}")
    # The figure is the background of an element, or an image larger than icons.
    figure = (
        "return [...document.querySelectorAll('img, canvas, .rc-image-img, [style*=blob]')]"
        ".map(i => i.getBoundingClientRect()).filter(b => b.width > 200).map(b => [b.width, b.height])[0]"
    )
    width, height = wait_for(driver, figure, name)
    time.sleep(1)
    return int(width), int(height)


@contextmanager
def serve_pages(results: Path) -> Iterator[str]:
    """Serve the pages in a subprocess; yield their address."""
    program = (
        "import sys; from pathlib import Path; from moebench.tracking.ui import serve\n"
        "say = lambda url: print(url, flush=True)\n"
        "sys.exit(serve(Path(sys.argv[1]), port=int(sys.argv[2]), on_ready=say))"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", program, str(results), str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the server did not start, see {results / 'ui.log'}")
        yield url
    finally:
        server.terminate()
        server.communicate()


def main(results: Path, target: Path, experiment: str | None = None) -> None:
    """Write the screenshots."""
    target.mkdir(parents=True, exist_ok=True)
    with silence_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(default_uri(results))
        candidates = [entry for entry in client.search_experiments() if experiment in (None, entry.name)]
        newest = max(candidates, key=lambda entry: entry.creation_time)
        runs = client.search_runs([newest.experiment_id])
    parent = next(run.info.run_id for run in runs if run.data.tags[CELL] == EXPERIMENT)
    files = {run.info.run_id: {file.path for file in client.list_artifacts(run.info.run_id)} for run in runs}
    run_id = next(key for key, names in files.items() if "load.png" in names)
    with serve_pages(results) as url, open_browser() as driver:

        def save(name: str) -> None:
            driver.save_screenshot(str(target / f"{name}.png"))

        show_view(driver, url, newest.experiment_id, is_chart=True, texts=("Curves",))
        save("mlflow")
        show_view(driver, url, newest.experiment_id, is_chart=False, texts=("Group:",))
        save("mlflow-table")
        show_run(driver, url, newest.experiment_id, parent, ("Description",))
        unfold_description(driver)
        save("mlflow-experiment")
        show_run(driver, url, newest.experiment_id, parent, (TABLE, "verdict"), f"artifacts/{TABLE}")
        save("mlflow-comparison")
        show_run(driver, url, newest.experiment_id, run_id, ("eval",), "model-metrics")
        save("mlflow-run")
        show_figure(driver, url, newest.experiment_id, run_id, "load.png")
        save("mlflow-load")
        if REPORT_FILE in files[parent]:
            show_run(driver, url, newest.experiment_id, parent, (REPORT_FILE,), f"artifacts/{REPORT_FILE}")
            read_frame(driver)
            save("mlflow-report")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
