"""A headless browser for pages that are files, and what it saw: requests and messages of the console."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "screenshot_ui.py"


def load_script() -> ModuleType:
    """Return the script that takes screenshots, whose browser tests use too."""
    spec = importlib.util.spec_from_file_location("screenshot_ui", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_file(driver: Any, file: Path, *, width: int, **media: str) -> list[str]:
    """Open a page at a width in CSS pixels; return the addresses it asked for, without its own, and its messages.

    `media`: `media="print"`, or features such as `prefers_color_scheme="dark"`.
    """
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items() if name != "media"]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    driver.get_log("performance")
    driver.get_log("browser")
    driver.get(file.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    seen = [url for url in requests if url != file.as_uri()]
    return seen + [entry["message"] for entry in driver.get_log("browser")]
