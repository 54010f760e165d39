"""The experiment files that the pages show can be planned."""

import re
from pathlib import Path

from moebench.experiment.grid import expand
from moebench.models.cost import cost_of
from moebench.training.model import build_model, prepare_task

PAGE = Path(__file__).parents[2] / "docs" / "running.md"


def test_the_files_of_the_page_on_running_fit_their_models(tmp_path: Path) -> None:
    first, arms = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]
    assert "grid:\n  arm:" in arms
    base, _, rest = first.partition("grid:")
    with_arms = base + arms + "seeds:" + rest.partition("seeds:")[2]
    for name, text in {"first": first, "arms": with_arms}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        for cell in expand(file).cells[:4]:
            model = build_model(cell.config, prepare_task(cell.config, tmp_path))
            assert cost_of(model.backbone, [], 128).flops_per_token > 0
