"""Take screenshots of the MLflow pages of a results folder for the README.

    python scripts/screenshot_ui.py RESULTS OUT.png [EXPERIMENT]

Writes OUT.png (runs and charts of the experiment) and OUT-load.png (the load figure of one run). Requires chromium and
chromedriver.
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

from moebench.tracking.address import default_uri
from moebench.tracking.quiet import silence_mlflow

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
_SEARCH = 'input[placeholder="Search metric charts"]'


def find_chromium() -> str | None:
    """Return the path of the browser; None if it or its driver is missing."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return path if shutil.which("chromedriver") else None


@contextmanager
def browser() -> Iterator[Any]:
    """Open a headless browser with a temporary profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(find_chromium())
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
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


def show_charts(driver: Any, url: str, experiment_id: str, parent: str, children: tuple[str, ...]) -> int:
    """Open the charts of an experiment with expanded child runs; return the number of charts."""
    open_page(driver, f"{url}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART", (parent,))
    # Child runs are collapsed at first, and MLflow draws no charts of collapsed runs.
    unfold = "[data-component-id*=runnamecellrenderer]"
    wait_for(driver, f"return document.querySelector('{unfold}')", "the button that expands runs").click()
    for child in children:
        wait_for(driver, f"return document.body.innerText.includes({child!r})", child)
    wait_for(driver, "return document.querySelectorAll('.js-plotly-plot').length", "a chart")
    search = wait_for(driver, f"return document.querySelector({_SEARCH!r})", "the chart search")
    search.send_keys("eval/bits_per_byte$|loss/task")
    time.sleep(4)
    count = wait_for(driver, "return document.querySelectorAll('.js-plotly-plot').length", "a chart")
    return int(count)


def show_figure(driver: Any, url: str, experiment_id: str, run_id: str, name: str) -> tuple[int, int]:
    """Open a figure of a run and return its size in pixels."""
    open_page(driver, f"{url}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{name}", (name,))
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
    """Write the two screenshots."""
    with silence_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(default_uri(results))
        candidates = [entry for entry in client.search_experiments() if experiment in (None, entry.name)]
        newest = max(candidates, key=lambda entry: entry.creation_time)
        runs = client.search_runs([newest.experiment_id])
    children = [run for run in runs if "moebench.arm" in run.data.tags]
    names = tuple(run.info.run_name for run in children[:2])
    ids = [run.info.run_id for run in children]
    run_with_figure = next(i for i in ids if "load.png" in {file.path for file in client.list_artifacts(i)})
    with serve_pages(results) as url, browser() as driver:
        show_charts(driver, url, newest.experiment_id, newest.name, names)
        driver.save_screenshot(str(target))
        show_figure(driver, url, newest.experiment_id, run_with_figure, "load.png")
        driver.save_screenshot(str(target.with_name(f"{target.stem}-load{target.suffix}")))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
