"""`moebench curve` on real runs, and a tiny vision experiment from training to curve."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results


def test_the_trained_setting_gives_the_trained_result(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "curve", "./tiny.yaml", "--vary", "capacity=null,0.25", "--json")
    assert ended.code == 0, ended.err
    curve, results = ended.json, Results(finished.folder / "results")
    assert (curve["metric"], curve["lower_is_better"], curve["vary"]) == (
        "bits_per_byte", True, ["layout.capacity_factor_eval"],
    )  # fmt: skip
    dense, *points = sorted(curve["points"], key=lambda point: point["arm"] != "dense")
    assert [(point["arm"], point["settings"]["layout.capacity_factor_eval"]) for point in points] == [
        (arm, value) for arm in ("switch", "top_k") for value in ("null", "0.25")
    ]
    assert curve["notes"] == []
    # The dense arm is the reference, as trained.
    dense_runs = {str(seed): results.result("dense", seed) for seed in (0, 1, 2)}
    assert dense["settings"] == {}
    assert dense["seeds"] == {seed: run["metrics"]["bits_per_byte"] for seed, run in dense_runs.items()}
    assert dense["flops_by_seed"] == {seed: run["cost"]["eval_flops_per_token"] for seed, run in dense_runs.items()}
    for dropless, scarce in zip(points[::2], points[1::2], strict=True):
        # As trained: the same number to the last bit, and the same cost.
        runs = {str(seed): results.result(dropless["arm"], seed) for seed in (0, 1, 2)}
        assert dropless["seeds"] == {seed: run["metrics"]["bits_per_byte"] for seed, run in runs.items()}
        assert dropless["flops_by_seed"] == {seed: run["cost"]["eval_flops_per_token"] for seed, run in runs.items()}
        assert dropless["relative_flops"] == 1
        assert dropless["load"]["load/drop_rate"] == 0
        assert scarce["seeds"] != dropless["seeds"]
        assert scarce["load"]["load/drop_rate"] >= 0.75 - 1e-9
        assert scarce["relative_flops"] < 1
        assert scarce["interval"][0] < scarce["mean"] < scarce["interval"][1]
        assert scarce["flops_per_token"] < dropless["flops_per_token"]


def test_more_experts_per_token_cost_more(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    figure = tmp_path / "curve.png"
    line = ["curve", "./tiny.yaml", "--vary", "top_k=2,4", "--vary", "overflow=drop,pass"]
    ended = warm(finished, *line, "--markdown", "--plot", str(figure))
    assert ended.code == 0, ended.err
    assert "| arm | top_k | overflow | seeds | mean | FLOPs/token |" in ended.out
    assert ended.out.count("| top_k | ") == 5  # and the header
    assert "| dense | as trained | as trained | 3 |" in ended.out
    assert "| switch | – | drop | 3 |" in ended.out
    assert "| top_k | 4 | pass | 3 |" in ended.out
    assert "Pareto front: a point is dominated where another one costs no more FLOPs" in ended.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    values = warm(finished, *line, "--json").json
    points = [point for point in values["points"] if point["arm"] == "top_k"]
    assert [tuple(point["settings"].values()) for point in points] == [
        ("2", "drop"), ("4", "drop"), ("2", "pass"), ("4", "pass"),
    ]  # fmt: skip
    assert points[0]["relative_flops"] == 1
    assert points[1]["relative_flops"] > 1.1
    table = warm(finished, *line)
    assert table.code == 0
    assert "bits per byte by router.top_k, layout.overflow" in table.out


def test_a_key_that_no_arm_has_is_refused(finished: CommandLine, warm: WarmCommandLine) -> None:
    for key, words in {"router.null_share=1": "null_share", "capacty=1": "Did you mean 'capacity'"}.items():
        ended = warm(finished, "curve", "./tiny.yaml", "--vary", key)
        assert (ended.code, ended.out) == (2, "")
        assert words in ended.err
        assert ended.err.count("\n") == 1


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
    line = ["--vary", "layout.capacity_factor_eval=0.5,1", "--vary", "router.priority=best,position"]
    curve = warm(vision, "curve", "./vision.yaml", skip, *line, "--json")
    assert curve.code == 0, curve.err
    points = {(p["arm"], *p["settings"].values()): p for p in curve.json["points"]}
    assert set(points) == {
        ("dense",),
        *(("v_moe", value, priority) for priority in ("best", "position") for value in ("0.5", "1")),
        *(("expert_choice", value) for value in ("0.5", "1")),
    }
    assert points["v_moe", "1", "best"]["mean"] == metrics["accuracy"]
    plan = warm(vision, "plan", "./vision.yaml", skip, "--json").json["cells"]
    assert plan[0]["train_tokens"] == 6 * 8 * 4
