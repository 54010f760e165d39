"""What the pages in docs/ show: experiment files can be planned, Python code runs, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.command_line import ROOT, CommandLine, WarmCommandLine
from support.ladder_results import write_size

from moebench.analysis.pooled.effective_report import build_ladder_report
from moebench.analysis.pooled.ladder import read_ladder
from moebench.config import resolve, to_plain
from moebench.experiment.grid import expand
from moebench.models.cost import compute_cost
from moebench.training.model import build_model, prepare_task
from moebench.yaml_text import parse_yaml

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_files_of_the_page_on_running_fit_their_models(cli: CommandLine) -> None:
    page = (ROOT / "docs" / "running.md").read_text()
    first, arms = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[:2]
    assert "grid:\n  arm:" in arms
    base, _, rest = first.partition("grid:")
    with_arms = base + arms + "seeds:" + rest.partition("seeds:")[2]
    for name, text in {"first": first, "arms": with_arms}.items():
        file = cli.folder / f"{name}.yaml"
        file.write_text(text)
        for cell in expand(file, [f"task.data.path={cli.folder / 'text'}"]).cells[:4]:
            model = build_model(cell.config, prepare_task(cell.config, cli.folder))
            assert compute_cost(model.backbone, [], 128).flops_per_token > 0


def test_the_models_of_the_page_on_the_transformer_are_built(cli: CommandLine) -> None:
    [models] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "model.md").read_text(), re.DOTALL)
    named = yaml.safe_load(models)
    assert len(named) == 7
    for settings in named.values():
        config = resolve(parse_yaml(yaml.safe_dump(settings), "model.md"))
        assert to_plain(config.model) != to_plain(resolve({}).model)
        data = replace(config.task.data, path=str(cli.folder / "text"))  # type: ignore[attr-defined]
        small = replace(config, task=replace(config.task, data=data))
        build_model(small, prepare_task(small, cli.folder))


def test_the_ladder_of_the_page_on_comparing_has_three_sizes(cli: CommandLine) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "comparing.md").read_text(), re.DOTALL)
    (cli.folder / "ladder.yaml").write_text(text)
    ladder = expand(cli.folder / "ladder.yaml", [f"task.data.path={cli.folder / 'text'}", "task.data.tokenizer=bytes"])
    for number, label in enumerate(("small", "medium", "large")):
        cells = tuple(cell for cell in ladder.cells if label in cell.arm)
        write_size(cli.folder / "results", replace(ladder, cells=cells), 10.0 + number, {"hash": 1.2, "top_k": 2.0})
    values = build_ladder_report(read_ladder([ladder], cli.folder / "results")).values
    assert [*values["sizes"]] == ["ladder (small)", "ladder (medium)", "ladder (large)"]
    assert values["arms"]["top_k"]["compute"]["value"] > values["arms"]["hash"]["compute"]["value"] > 1


def test_the_code_of_the_page_on_the_api_runs(cli: CommandLine, warm: WarmCommandLine) -> None:
    """On the small text of the tests: encoding the embedded one would take most of the time."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    code = "\n".join(blocks)
    assert "train.steps=200" in code
    small = '"train.steps=2", "seeds=[0]", "task.data.path=text", "task.data.tokenizer=bytes"'
    (cli.folder / "page.py").write_text(
        code.replace('"train.steps=200"', small).replace("eval_windows=16", "eval_windows=4")
    )
    done = warm.run_script(cli, cli.folder / "page.py")
    assert done.code == 0, done.err
    assert "3 ['dense', 'switch', 'top_k']" in done.out
    assert "Quality: bits per byte on the test split" in done.out


@pytest.mark.slow
def test_the_commands_of_the_tutorial_work(cli: CommandLine, warm: WarmCommandLine) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    [experiment] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    router, table = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = re.sub(r"steps: 300.*?}", "steps: 4, batch_size: 2}", experiment).replace("[0, 1, 2, 3, 4]", "[0]")
    (cli.folder / "first.yaml").write_text(small.replace("eval_windows: 64", "eval_windows: 4"))
    (cli.folder / "my_router.py").write_text(router)
    commands = re.findall(
        r"^moebench ((?:plan|run|compare|report|curve) first.yaml.*?)(?:  +#.*| {4,}.*)?$", page, re.MULTILINE
    )
    assert len(commands) == 9
    for command in commands:
        without_tracker = ["--tracker", "none"] if command.startswith("run") else []
        done = warm(cli, *shlex.split(command), *without_tracker, timeout=200)
        assert done.code == 0, done.err
    code = [sys.executable, "-c", table]
    done = subprocess.run(code, cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "my_router" in done.stdout


@pytest.mark.parametrize("page", ["architecture.md", "experts.md"])
def test_the_source_files_that_a_page_names_exist(page: str) -> None:
    names = re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", (ROOT / "docs" / page).read_text())
    assert len(names) > 5
    folders = [ROOT, *(ROOT / "moebench").rglob("")]
    assert not [name for name in names if not any((folder / name).exists() for folder in folders)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if target.startswith("http"):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
