"""The report in a real browser: no wider than a phone, nothing loaded, no message of the console."""

from pathlib import Path

import pytest
from support.browser import load_script, open_file
from support.stored_grid import Grid, write_grid

from moebench.analysis.html_report.build import Source, build_page

LONG = "a question with a_very_long_name_without_a_space_" + "x" * 120 + " <script>document.title = 'run'</script>"
WIDTHS = "return [document.documentElement.scrollWidth, window.innerWidth]"


@pytest.mark.slow
def test_the_report_fits_a_phone_and_loads_nothing(tmp_path: Path) -> None:
    script = load_script()
    if script.find_chromium() is None:
        pytest.skip("no chromium with chromedriver on this machine (Debian: apt-get install chromium-driver)")
    experiment = write_grid(tmp_path, Grid(arms=12, seeds=3, points=4, question=LONG))
    source = Source(experiment=experiment, results=tmp_path / "results", command="moebench run x", made_at="today")
    file = tmp_path / "report.html"
    file.write_text(build_page(source).html, encoding="utf-8")
    with script.open_browser() as driver:
        for width, media in ((375, {}), (1180, {"prefers_color_scheme": "dark"}), (700, {"media": "print"})):
            assert open_file(driver, file, width=width, **media) == []
            page_width, window_width = driver.execute_script(WIDTHS)
            assert page_width <= window_width
        # The style sheet is applied, so its hash is right; scripts are not.
        assert driver.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
        assert driver.title.startswith("stored: a question")
        # One axis at a time on a screen, chosen by a click without a script.
        open_file(driver, file, width=375)
        shown = "return [...document.querySelectorAll('.pane')].map(e => e.offsetHeight > 0)"
        assert driver.execute_script(shown) == [True, False, False, False]
        driver.find_element("css selector", "label[for=axis-3]").click()
        assert driver.execute_script(shown) == [False, False, True, False]
        # Wide tables scroll in boxes of their own.
        boxes = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert driver.execute_script(boxes) > 0
