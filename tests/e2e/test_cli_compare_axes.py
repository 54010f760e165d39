"""`moebench compare` on several axes, over several experiments and over sizes."""

from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.ladder_results import write_experiment, write_size
from support.results_folder import Results, journal


def test_the_table_on_all_axes_is_of_the_evaluations(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "compare", "./tiny.yaml", "--json", "--axis", "flops")
    assert (ended.code, ended.err) == (0, "")
    fairness, results = ended.json["fairness"], Results(finished.folder / "results")
    assert (fairness["split"], fairness["num_evaluations"]) == ("validation", 2)
    switch_S, dense_S = (
        [results.result(arm, seed)["validation"]["bits_per_byte"] for seed in range(3)] for arm in ("switch", "dense")
    )
    by_hand = (sum(switch_S) - sum(dense_S)) / 3
    switch = fairness["arms"]["switch"]
    assert switch["equal"]["tokens"]["difference"] == pytest.approx(by_hand, rel=1e-9)
    assert switch["equal"]["parameters"]["problem"] == "not run"
    assert any("train.eval_every=" in note for note in fairness["notes"])
    cost = results.result("dense", 0)["cost"]
    flops = 3 * cost["train_flops_per_token"] * cost["train_tokens"]
    assert fairness["totals"]["dense"]["flops"] == pytest.approx(flops)
    curve = ended.json["along_axis"]["arms"]["dense"]["curve"]
    assert [spent for spent, _ in curve] == pytest.approx([flops / 2, flops])


def test_evaluations_have_the_seconds_of_training(finished: CommandLine) -> None:
    for folder in Results(finished.folder / "results").folders():
        seconds = [p["metrics"]["time/train_s"] for p in journal(folder) if "eval/bits_per_byte" in p["metrics"]]
        assert 0 < seconds[0] < seconds[1]


def test_curves_are_drawn_over_an_axis(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    for axis in ("seconds", "tokens"):
        file = tmp_path / f"{axis}.svg"
        ended = warm(finished, "compare", "./tiny.yaml", "--axis", axis, "--plot", str(file))
        assert (ended.code, ended.err) == (0, "")
        assert f"Over {axis}: bits per byte on the validation split" in ended.out
        assert file.read_text(encoding="utf-8").startswith("<?xml")


@pytest.fixture
def ladder(cli: CommandLine) -> CommandLine:
    """Three experiments over 2 decades with planted results, in which switch is worth 1.5 times the compute."""
    for number, width in enumerate((16, 32, 64)):
        data = {"path": str(cli.folder / "text.txt")}
        base = {"task": {"sequence_length": 16, "data": data}, "model": {"d_model": width}}
        experiment = write_experiment(cli.folder, f"S{number}", base=base)
        write_size(cli.folder / "results", experiment, 13.0 + number, {"switch": 1.5}, {"switch": 12.5})
    return cli


def test_several_experiments_are_pooled(ladder: CommandLine, warm: WarmCommandLine) -> None:
    names = ("./S0.yaml", "./S1.yaml", "./S2.yaml")
    ended = warm(ladder, "compare", *names)
    assert (ended.code, ended.err) == (0, "")
    assert "Over 3 experiments (9 pairs), switch is better than dense: +" in ended.out
    pooled = warm(ladder, "compare", *names, "--json").json
    assert [*pooled["experiments"]] == ["S0", "S1", "S2"]
    switch = pooled["arms"]["switch"]
    assert (switch["verdict"], switch["pairs"], switch["fixed"]["p"]) == ("better", 9, 2 / 2**9)
    assert [*switch["tasks"]] == ["S0", "S1", "S2"]


def test_effective_compute_over_sizes(ladder: CommandLine, warm: WarmCommandLine) -> None:
    names = ("./S0.yaml", "./S1.yaml", "./S2.yaml")
    worth = warm(ladder, "compare", *names, "--effective-compute", "--json").json["arms"]["switch"]
    low, high = worth["compute"]["interval"]
    assert low < 1.5 < high < 1.8
    assert worth["wall_clock"]["value"] == pytest.approx(0.8 * worth["compute"]["value"])
    shown = warm(ladder, "compare", *names, "--effective-compute", "--markdown")
    assert f"- {worth['sentence']}" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./S0.yaml", "./S1.yaml", "--effective-compute"), "2 sizes over 1.0 decades of training FLOPs"),
        (("./S0.yaml", "./S0.yaml"), "in common (dense, seed 0), which would count twice"),
        (("./S0.yaml", "./S1.yaml", "--axis", "flops"), "--axis: is for one experiment, got S0, S1"),
        (("./S0.yaml", "switch"), "got experiments (./S0.yaml) and routers (switch)"),
        (("switch", "top_k", "--effective-compute"), "several sizes are for experiments, got routers: switch, top_k"),
    ],
)
def test_mistakes_are_one_line(
    ladder: CommandLine, warm: WarmCommandLine, arguments: tuple[str, ...], message: str
) -> None:
    ended = warm(ladder, "compare", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
