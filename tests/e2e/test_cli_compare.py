"""`moebench compare` on real runs: JSON, Markdown, terminal, figure; half-done, unmatched, single-seed grids."""

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results, journal
from support.tiny_experiment import ARMS

from moebench.metrics import find_metric

SPLITS = ("test", "validation")


def test_json_has_quality_speed_and_cost_of_each_arm(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "compare", "./tiny.yaml", "--json")
    assert (ended.code, ended.err) == (0, "")
    comparison, results = ended.json, Results(finished.folder / "results")
    assert (comparison["metric"], comparison["lower_is_better"], comparison["baseline"]) == (
        "bits_per_byte",
        True,
        "dense",
    )
    assert [*comparison["arms"]] == [*ARMS]
    assert (comparison["failed"], comparison["missing"], comparison["num_comparisons"]) == ([], [], 2)
    for name, arm in comparison["arms"].items():
        finals = {str(seed): results.result(name, seed)["metrics"]["bits_per_byte"] for seed in (0, 1, 2)}
        quality = arm["bits_per_byte"]
        assert quality["seeds"] == finals
        assert quality["mean"] == pytest.approx(sum(finals.values()) / 3, rel=1e-12)
        low, high = quality["interval"]
        assert low < quality["mean"] < high
        assert arm["throughput"]["tokens_per_s"] > 0
        assert {"flops_per_token", "active_params", "total_params", "train_tokens"} <= set(arm["cost"])
        assert {"a", "b"} == set(arm["domains"])
        assert arm["runs"] == {"done": 3, "failed": 0, "diverged": 0, "missing": 0}
    assert comparison["arms"]["dense"]["difference"] is None
    assert comparison["arms"]["dense"]["load"] == {}
    assert comparison["arms"]["dense"]["throughput"]["share_of_baseline"] == 1


def test_trivial_baselines_are_recorded_and_the_data_are_not_needed(
    finished: CommandLine, cli: CommandLine, warm: WarmCommandLine
) -> None:
    before = warm(finished, "compare", "./tiny.yaml", "--json").json
    names = [baseline["name"] for baseline in before["trivial_baselines"]]
    assert names == [*(f"order-{order} n-gram" for order in range(1, 6)), "gzip -9", "bz2 -9", "xz -9e"]
    (reference,) = (each["values"] for each in before["trivial_baselines"] if each["is_reference"])
    dense = before["arms"]["dense"]["bits_per_byte"]["mean"]
    assert before["below_trivial_baselines"] is (dense >= reference["bits_per_byte"])
    cli.write(seeds=[0, 1, 2])
    shutil.copytree(finished.folder / "results", cli.folder / "results")
    shutil.rmtree(cli.folder / "results" / "cache")
    shutil.rmtree(cli.folder / "text")
    for split in ("test", "validation"):
        ended = warm(cli, "compare", "./tiny.yaml", "--json", "--split", split)
        assert (ended.code, ended.err) == (0, ""), ended.err
        assert ended.json["trivial_baselines"]
    assert warm(cli, "compare", "./tiny.yaml", "--json").json == before
    shown = warm(cli, "compare", "./tiny.yaml", "--markdown")
    assert "| order-3 n-gram | – |" in shown.out


def test_json_has_load_and_difference_of_each_sparse_arm(finished: CommandLine, warm: WarmCommandLine) -> None:
    comparison = warm(finished, "compare", "./tiny.yaml", "--json").json
    base = comparison["arms"]["dense"]["bits_per_byte"]["seeds"]
    for name in ("switch", "top_k"):
        arm = comparison["arms"][name]
        assert {
            "max_violation",
            "cv",
            "entropy",
            "dead_experts",
            "drop_rate",
            "reroute_rate",
            "unserved",
            "experts_per_token",
            "flops_per_token",
            "train_drop_rate",
            "train_unserved",
            "information/domain",
            "information/position",
            "information/token",
        } == set(arm["load"])
        difference = arm["difference"]
        by_hand = sum(arm["bits_per_byte"]["seeds"][seed] - base[seed] for seed in base) / 3
        assert difference["mean"] == pytest.approx(by_hand, rel=1e-9)
        low, high = difference["interval"]
        assert low < difference["mean"] < high
        assert difference["p"] <= difference["p_holm"] <= 1
        assert difference["baseline"] == "dense"
        assert difference["verdict"] in ("better", "worse", "undecided")
        assert abs(arm["cost"]["flops_per_token"] / comparison["arms"]["dense"]["cost"]["flops_per_token"] - 1) <= 0.02


def test_every_recorded_metric_is_declared(finished: CommandLine) -> None:
    results = Results(finished.folder / "results")
    names: set[str] = set()
    for arm in ARMS:
        result = results.result(arm, 0)
        names |= {*result["metrics"], *result["validation"], *result["cost"], *result["throughput"]}
        names |= {name for point in journal(results.folder(arm, 0)) for name in point["metrics"]}
    assert len(names) > 60
    assert [name for name in sorted(names) if find_metric(name) is None] == []


def test_tables_as_markdown_and_text(finished: CommandLine, warm: WarmCommandLine) -> None:
    markdown = warm(finished, "compare", "./tiny.yaml", "--markdown")
    assert (markdown.code, markdown.err) == (0, "")
    assert "| arm | seeds | mean |" in markdown.out
    assert all(f"| {arm} | 3 |" in markdown.out for arm in ARMS)
    table = warm(finished, "compare", "./tiny.yaml")
    assert (table.code, table.err) == (0, "")
    assert "\x1b" not in table.out
    assert all(word in table.out for word in ("p Holm", "MaxVio", "Compute per token", "tokens/s", "baseline"))


def test_the_plot_is_a_figure(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    ended = warm(finished, "compare", "./tiny.yaml", "--plot", str(file), "--json")
    assert ended.code == 0, ended.err
    assert ended.json["metric"] == "bits_per_byte"
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


def test_a_half_done_grid_is_an_early_look(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    results = Results(tmp_path / "results")
    for arm, seed in (("top_k", 2), ("switch", 2), ("dense", 2), ("top_k", 1)):
        shutil.rmtree(results.folder(arm, seed))
    ended = warm(finished, "compare", "./tiny.yaml", "--json", "--results", str(results.path))
    assert ended.code == 0, ended.err
    assert {(cell["arm"], cell["seed"]) for cell in ended.json["missing"]} == {
        ("dense", 2), ("switch", 2), ("top_k", 2), ("top_k", 1),
    }  # fmt: skip
    assert ended.json["arms"]["top_k"]["runs"] == {"done": 1, "failed": 0, "diverged": 0, "missing": 2}
    assert any("early look" in note for note in ended.json["notes"])
    nothing = warm(finished, "compare", "./tiny.yaml", "--results", str(tmp_path / "nothing"))
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.err.startswith("error: ")
    assert nothing.err.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("seeds", ["[0]", "[0,1]"])
def test_few_seeds_decide_nothing(finished: CommandLine, warm: WarmCommandLine, seeds: str) -> None:
    comparison = warm(finished, "compare", "./tiny.yaml", f"seeds={seeds}", "--json").json
    for arm in ARMS[1:]:
        assert comparison["arms"][arm]["difference"]["verdict"] == "too few seeds"
        assert "best" not in comparison["arms"][arm]["marks"]
    table = warm(finished, "compare", "./tiny.yaml", f"seeds={seeds}").out
    assert "too few seeds" in table
    assert "best" not in table


def test_arms_of_another_cost_are_marked_and_get_no_verdict(cli: CommandLine, warm: WarmCommandLine) -> None:
    wide = "grid.router=[dense,switch]", "layout.expert_width=8", "seeds=[0]", "train.steps=3"
    assert warm(cli, "run", "./tiny.yaml", *wide, "--tracker", "none").code == 0
    marked = warm(cli, "compare", "./tiny.yaml", *wide, "--json")
    assert marked.code == 0, marked.err
    assert marked.json["arms"]["switch"]["marks"] == ["≠FLOPs"]
    assert marked.json["arms"]["switch"]["difference"]["verdict"] == "not matched"
    assert marked.json["arms"]["switch"]["flops_vs_baseline"]["training"] < 0.98
    table = warm(cli, "compare", "./tiny.yaml", *wide).out
    assert "switch (≠FLOPs)" in table
    assert "Note: switch: executed forward FLOPs per token are 0." in " ".join(table.split())
    allowed = warm(cli, "compare", "./tiny.yaml", *wide, "--allow-mismatch", "--json")
    assert allowed.json["arms"]["switch"]["difference"]["verdict"] == "too few seeds"
    assert allowed.json["arms"]["switch"]["marks"] == ["≠FLOPs"]


def test_a_non_causal_router_runs_when_allowed_and_is_marked(cli: CommandLine, warm: WarmCommandLine) -> None:
    grid = "grid.router=[dense,expert_choice]", "allow_noncausal=true", "seeds=[0]", "train.steps=3"
    ended = warm(cli, "run", "./tiny.yaml", *grid, "--tracker", "none")
    assert ended.code == 0, ended.err
    assert Results(cli.folder / "results").result("expert_choice", 0)["marks"] == ["non-causal"]
    comparison = warm(cli, "compare", "./tiny.yaml", *grid, "--json").json
    assert comparison["arms"]["expert_choice"]["marks"] == ["non-causal"]
    assert comparison["arms"]["dense"]["marks"] == []
    assert "expert_choice (non-causal)" in warm(cli, "compare", "./tiny.yaml", *grid).out
    plan = warm(cli, "plan", "./tiny.yaml", *grid, "--json").json
    assert {cell["arm"]: cell["marks"] for cell in plan["cells"]} == {"dense": [], "expert_choice": ["non-causal"]}


def test_given_routers_it_trains_what_is_missing(cli: CommandLine, warm: WarmCommandLine) -> None:
    small = ["seeds=[0]", "train.steps=2", "train.batch_size=1", "model.d_model=16", "model.num_layers=1"]
    small += ["model.num_heads=2", "layout.n=1", "layout.num_experts=4", "task.sequence_length=32"]
    small += ["task.eval_windows=1", "task.data.path=text", "task.data.tokenizer=bytes"]
    ended = warm(cli, "compare", "switch", "top_k", *small, "--json")
    assert ended.code == 0, ended.err
    assert [*ended.json["arms"]] == ["dense", "switch", "top_k"]
    assert all(
        arm["runs"] == {"done": 1, "failed": 0, "diverged": 0, "missing": 0} for arm in ended.json["arms"].values()
    )
    assert "start    switch · seed 0" in ended.err
    before = Results(cli.folder / "results").written_at()
    again = warm(cli, "compare", "switch", "top_k", *small, "--json")
    assert again.json == ended.json
    assert Results(cli.folder / "results").written_at() == before


def test_settings_are_chosen_on_the_validation_split(finished: CommandLine, warm: WarmCommandLine) -> None:
    results = Results(finished.folder / "results")
    comparison = {split: warm(finished, "compare", "./tiny.yaml", "--split", split, "--json").json for split in SPLITS}
    assert warm(finished, "compare", "./tiny.yaml", "--json").json == comparison["test"]
    for split in SPLITS:
        assert comparison[split]["split"] == split
        table = warm(finished, "compare", "./tiny.yaml", "--split", split).out
        assert f"Quality: bits per byte on the {split} split, lower is better" in table
    for arm in ARMS:
        for seed in (0, 1, 2):
            result, last = results.result(arm, seed), evaluations(results.folder(arm, seed))[-1]
            of_training = {key: value for key, value in result["metrics"].items() if key.startswith("load/train_")}
            assert result["validation"] == last | of_training  # the journal's, at the last step
            value = comparison["validation"]["arms"][arm]["bits_per_byte"]["seeds"][str(seed)]
            assert value == last["bits_per_byte"] != result["metrics"]["bits_per_byte"]
    wrong = warm(finished, "compare", "./tiny.yaml", "--split", "train")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert "'test', 'validation'" in wrong.err


def evaluations(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each evaluation on the validation split."""
    points = [point["metrics"] for point in journal(folder) if "eval/bits_per_byte" in point["metrics"]]
    return [{key[5:]: value for key, value in point.items() if key.startswith("eval/")} for point in points]


def test_a_result_of_an_earlier_version_gets_validation_metrics(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    results = Results(tmp_path / "results")
    file = results.folder("switch", 1) / "result.json"
    old = json.loads(file.read_text())
    later = ("validation", "fault", "records", "version", "checksum")
    file.write_text(json.dumps({key: value for key, value in old.items() if key not in later}))
    compare = ("compare", "./tiny.yaml", "--results", str(results.path))
    assert warm(finished, *compare).code == 0
    refused = warm(finished, *compare, "--split", "validation")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert f"first switch, seed 1 ({file.parent.name})" in refused.err
    file.unlink()  # as the message says
    ended = warm(finished, "run", "./tiny.yaml", "--results", str(results.path), "--tracker", "none", "--json")
    assert (ended.code, len(ended.json["trained"])) == (0, 1), ended.err
    new = results.result("switch", 1)
    assert (new["validation"], new["metrics"]) == (old["validation"], old["metrics"])
    assert warm(finished, *compare, "--split", "validation").code == 0


def test_a_learning_rate_that_diverges_is_an_outcome(cli: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    rates = [0.005, 0.001, 1e30]
    good, other, bad = (f"top_k, learning_rate={rate}" for rate in rates)
    cli.write(grid={"router": ["top_k"], "train.learning_rate": rates}, baseline=good, seeds=[0], train={"steps": 3})
    assert warm(cli, "run", "./tiny.yaml", "--tracker", "none").code == 1
    comparison = warm(cli, "compare", "./tiny.yaml", "--json").json
    assert comparison["arms"][bad]["difference"]["verdict"] == "diverged"
    assert comparison["arms"][other]["difference"]["verdict"] == "too few seeds"
    assert comparison["arms"][bad]["runs"] == {"done": 0, "failed": 1, "diverged": 1, "missing": 0}
    table = warm(cli, "compare", "./tiny.yaml", "--markdown", "--plot", str(tmp_path / "figure.png"))
    assert table.code == 0, table.err
    assert f"| {bad} | 0 of 1 | – | – | – | 1 of 1 diverged |" in table.out
    for split, words in (("test", "choose with --split validation"), ("validation", "choose on validation, as here")):
        notes = warm(cli, "compare", "./tiny.yaml", "--json", "--split", split).json["notes"]
        assert any(note.startswith("this grid varies train.learning_rate: ") and words in note for note in notes)


def test_a_margin_is_a_share_and_stands_in_the_json(finished: CommandLine, warm: WarmCommandLine) -> None:
    stated = warm(finished, "compare", "./tiny.yaml", "--json", "--margin", "0.2").json
    dense = stated["arms"]["dense"]["bits_per_byte"]["mean"]
    assert stated["margin"] == {"share_of_baseline": 0.2, "value": pytest.approx(0.2 * dense)}
    in_file = warm(finished, "compare", "./tiny.yaml", "margin=0.3", "--json").json
    assert in_file["margin"]["share_of_baseline"] == 0.3
    for arguments, key, given in ((["--margin", "1.5"], "--margin", "1.5"), (["margin=0"], "margin", "0.0")):
        ended = warm(finished, "compare", "./tiny.yaml", *arguments)
        assert ended.code == 2
        assert f"{key} must be above 0 and below 1: a share of the baseline's mean, got {given}" in ended.err
