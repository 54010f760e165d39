"""The report of an experiment: what is on the page, the same bytes for the same store, nothing that runs."""

import hashlib
import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.stored_grid import Grid, write_grid

from moebench.analysis.html_report.build import Page, Source, build_page
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.folder import RunFolder, write_json
from moebench.runs.result import Fault

ATTACK = "\"'><script>alert(1)</script><img src=https://x.example/a onerror=alert(2)></style>\u202e"
GRID = Grid(arms=3, seeds=3, points=4, question=f"Which? {ATTACK}")


class Reader(HTMLParser):
    """Collects elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def build(experiment: Experiment, results: Path, made_at: str = "2026-01-02 03:04") -> Page:
    return build_page(Source(experiment=experiment, results=results, command="moebench run x.yaml", made_at=made_at))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    folder = tmp_path_factory.mktemp("stored")
    return write_grid(folder, GRID), folder / "results"


@pytest.fixture
def own_store(tmp_path: Path) -> tuple[Experiment, Path]:
    return write_grid(tmp_path, GRID), tmp_path / "results"


def change_result(results: Path, cell_id: str, **changes: object) -> None:
    folder = RunFolder.of(results, cell_id)
    result = folder.read_result()
    assert result is not None
    folder.write_result(replace(result, **changes))  # type: ignore[arg-type]


def require_inert(html: str) -> Reader:
    """Fail if a page has anything that runs or loads; return its content."""
    reader = Reader(html)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base", "image", "use"} & {*reader.tags}
    assert not [name for name in reader.attributes if name.startswith("on") or name in ("src", "style", "srcset")]
    assert all(address.startswith("#") for address in reader.attributes["href"])
    assert reader.tags.count("style") == 1
    assert "\u202e" not in html
    return reader


def test_the_page_answers_and_has_every_part(stored: tuple[Experiment, Path]) -> None:
    page = build(*stored)
    reader = require_inert(page.html)
    sections = [name for name in reader.attributes["id"] if not re.match("axis|pane", name)]
    assert sections == [
        "answer", "quality", "curves", "fairness", "cost", "experts", "domains", "settings", "provenance", "notes"
    ]  # fmt: skip
    for text in (
        "3 arms",
        "9 runs",
        "order-3",
        "minus dense",
        "moebench run x.yaml",
        "2026-01-02 03:04",
        "4a6725951e76",
    ):
        assert text in reader.text
    assert "Holm over 2 comparisons" in reader.text
    assert reader.tags.count("polyline") == 4 * (3 + 2) + 3  # of 4 axes: 3 arms, 2 with the baseline; 3 frontiers
    assert len(page.html) < 4_000_000
    assert [table.title.split(":")[0] for table in page.tables[-5:]] == [
        "By domain", "By domain minus dense", "Settings", "Settings of all arms", "Provenance"
    ]  # fmt: skip


def test_the_same_store_gives_the_same_bytes_but_the_time(stored: tuple[Experiment, Path]) -> None:
    first, again, later = build(*stored), build(*stored), build(*stored, made_at="2027-01-02 03:04")
    assert first.html == again.html
    assert first.html.replace("2026-01-02", "2027-01-02") == later.html


def test_the_policy_allows_this_style_sheet_alone(stored: tuple[Experiment, Path]) -> None:
    html = build(*stored).html
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = policy[1].replace("&#39;", "'")
    assert rules.startswith("default-src 'none'; style-src 'sha256-")
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = re.search("sha256-([^']*)'", rules)
    assert digest is not None
    assert b64decode(digest[1]) == hashlib.sha256(style[1].encode()).digest()
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_everything_from_results_is_inert(own_store: tuple[Experiment, Path]) -> None:
    experiment, results = own_store
    hostile = next(cell for cell in experiment.cells if cell.arm == "hash")
    folder = RunFolder.of(results, hostile.id)
    folder.loads.write_text(json.dumps({"step": 1, "layers": {ATTACK: [1, 2, 3]}}) + "\n")
    write_json(folder.environment, {"git_commit": ATTACK, "device": [ATTACK], "packages": {ATTACK: ATTACK}})
    result = folder.read_result()
    assert result is not None
    metrics = result.metrics | {f"bits_per_byte/{ATTACK}": 1.0, f"load/information/{ATTACK}": 0.5}
    changes = {"metrics": metrics, "version": ATTACK, "marks": (ATTACK,), "data_digest": result.data_digest}
    change_result(results, hostile.id, **changes, records=folder.digest_records())
    lost = next(cell for cell in experiment.cells if cell.arm == "switch")
    change_result(results, lost.id, status="failed", error=ATTACK, fault=Fault.DIVERGED, metrics={})
    page = build(experiment, results)
    reader = require_inert(page.html)
    assert "<script>alert(1)</script>" in reader.text  # shown, as text
    assert "&lt;script&gt;" in page.html


def test_an_unfinished_experiment_says_what_is_missing(own_store: tuple[Experiment, Path]) -> None:
    experiment, results = own_store
    for cell in experiment.cells[4:]:
        RunFolder.of(results, cell.id).result.unlink()
    reader = require_inert(build(experiment, results).html)
    assert "4 of 9 runs finished" in reader.text
    assert "5 of 9 cells have no result" in reader.text
    assert "no result yet" in reader.text


def test_damaged_files_are_named_and_cost_their_charts_alone(own_store: tuple[Experiment, Path]) -> None:
    experiment, results = own_store
    folders = [RunFolder.of(results, cell.id) for cell in experiment.cells if cell.arm == "hash"]
    folders[0].journal.write_text("{}\n")
    change_result(results, folders[1].path.name, records={})
    folders[1].loads.write_text('{"layers": {"0": [1, -5]}}\n')
    folders[2].environment.write_text("{")
    reader = require_inert(build(experiment, results).html)
    assert f"{folders[0].journal}: was changed after the run was done" in reader.text
    assert "has a load that is negative" in reader.text
    assert f"{folders[2].environment}: cannot be read" in reader.text


def test_without_any_result_there_is_no_report(own_store: tuple[Experiment, Path]) -> None:
    experiment, results = own_store
    for cell in experiment.cells:
        RunFolder.of(results, cell.id).result.unlink()
    with pytest.raises(UsageError, match="no cell of 'stored' has a result there yet"):
        build(experiment, results)


def test_a_damaged_result_is_named_instead_of_a_report(own_store: tuple[Experiment, Path]) -> None:
    experiment, results = own_store
    file = RunFolder.of(results, experiment.cells[0].id).result
    file.write_text("{")
    with pytest.raises(UsageError, match=re.escape(str(file))):
        build(experiment, results)


def test_of_many_arms_the_charts_show_twelve_and_the_tables_all(tmp_path: Path) -> None:
    page = build(write_grid(tmp_path, Grid(arms=16, seeds=3, points=2)), tmp_path / "results")
    reader = Reader(page.html)
    assert "Shown: 12 of 16 arms" in reader.text
    assert reader.tags.count("polyline") == 4 * (12 + 11) + 3
    assert len(page.tables[0].rows) == 16 + 2  # and trivial baselines
