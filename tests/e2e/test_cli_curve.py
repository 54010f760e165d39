"""`moebench curve` on real runs, and a tiny vision experiment from training to curve."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import CommandLine, Results, WarmCommandLine


def test_the_trained_setting_gives_the_trained_result(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "curve", "./tiny.yaml", "--vary", "layout.capacity_factor_eval=null,0.25", "--json")
    assert ended.code == 0, ended.err
    curve, results = ended.json, Results(finished.folder / "results")
    assert (curve["metric"], curve["lower_is_better"], curve["by"]) == ("bits_per_byte", True, None)
    assert [(point["arm"], point["value"]) for point in curve["points"]] == [
        (arm, value) for arm in ("switch", "top_k") for value in ("null", "0.25")
    ]
    assert curve["notes"] == ["dense: has no experts, or no layout.capacity_factor_eval"]
    for dropless, scarce in zip(curve["points"][::2], curve["points"][1::2], strict=True):
        # As trained: the same number to the last bit, and the same cost.
        finals = {str(s): results.result(dropless["arm"], s)["metrics"]["bits_per_byte"] for s in (0, 1, 2)}
        assert dropless["seeds"] == finals
        assert dropless["relative_flops"] == 1
        assert dropless["load"]["load/drop_rate"] == 0
        assert scarce["seeds"] != finals
        assert scarce["load"]["load/drop_rate"] >= 0.75 - 1e-9
        assert scarce["relative_flops"] < 1
        assert scarce["interval"][0] < scarce["mean"] < scarce["interval"][1]


def test_more_experts_per_token_cost_more(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    figure = tmp_path / "curve.png"
    line = ["curve", "./tiny.yaml", "--vary", "router.top_k=2,4", "--by", "layout.overflow=drop,pass"]
    ended = warm(finished, *line, "--markdown", "--plot", str(figure))
    assert ended.code == 0, ended.err
    assert "| arm | value | overflow | seeds | mean |" in ended.out
    assert ended.out.count("| top_k | ") == 4
    assert "- switch: has no experts, or no router.top_k" in ended.out
    assert "| top_k | 2 | drop | 3 |" in ended.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    curve = warm(finished, *line, "--json").json["points"]
    assert [point["relative_flops"] for point in curve[:1]] == [1]
    assert curve[1]["relative_flops"] > 1.1
    table = warm(finished, *line)
    assert table.code == 0
    assert "bits per byte by router.top_k" in table.out


VISION = """
base:
  task: {name: vision, data: {path: pictures, size: 8}}
  model: {d_model: 8, num_layers: 2, num_heads: 2, ffn_width: 64}
  layout: {name: last_n, n: 1, num_experts: 4, capacity_factor_train: 1.0, capacity_factor_eval: 1.0}
  train: {steps: 6, batch_size: 8, warmup_steps: 2, eval_every: 3, log_every: 1, device: cpu}
grid:
  router: [dense, v_moe, expert_choice]
seeds: [0]
baseline: dense
"""


@pytest.fixture
def vision(cli: CommandLine) -> CommandLine:
    """A folder of pictures, one of them broken, and an experiment on them."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (cli.folder / "pictures" / name).mkdir(parents=True)
        for index in range(20):
            pixels = draw.integers(0, 256, (10, 9)).astype(np.uint8)
            Image.fromarray(pixels).save(cli.folder / "pictures" / name / f"{index}.png")
    (cli.folder / "pictures" / "a" / "broken.png").write_bytes(b"no picture")
    (cli.folder / "vision.yaml").write_text(VISION)
    return cli


def test_own_pictures_from_run_to_curve(vision: CommandLine, warm: WarmCommandLine) -> None:
    refused = warm(vision, "run", "./vision.yaml", "--tracker", "none")
    assert (refused.code, refused.out) == (2, "")
    assert "'a/broken.png' cannot be read as an image" in refused.err
    assert refused.err.count("\n") == 1
    skip = "task.data.skip_broken=true"
    ended = warm(vision, "run", "./vision.yaml", skip, "--tracker", "none")
    assert ended.code == 0, ended.err
    metrics = Results(vision.folder / "results").result("v_moe", 0)["metrics"]
    assert metrics["skipped_images"] == 1
    compared = warm(vision, "compare", "./vision.yaml", skip, "--json")
    assert compared.code == 0, compared.err
    assert (compared.json["metric"], compared.json["lower_is_better"]) == ("accuracy", False)
    assert compared.json["arms"]["dense"]["marks"] == []
    assert set(compared.json["arms"]["v_moe"]["marks"]) <= {"≠FLOPs"}  # a capacity drops assignments in training
    line = ["--vary", "layout.capacity_factor_eval=0.5,1", "--by", "router.priority=best,position"]
    curve = warm(vision, "curve", "./vision.yaml", skip, *line, "--json")
    assert curve.code == 0, curve.err
    points = {(p["arm"], p["by"], p["value"]): p for p in curve.json["points"]}
    assert set(points) == {
        *(("v_moe", by, value) for by in ("best", "position") for value in ("0.5", "1")),
        *(("expert_choice", None, value) for value in ("0.5", "1")),
    }
    assert points["v_moe", "best", "1"]["mean"] == metrics["accuracy"]
    plan = warm(vision, "plan", "./vision.yaml", skip, "--json").json["cells"]
    assert plan[0]["train_tokens"] == 6 * 8 * 4
