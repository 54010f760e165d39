"""`moebench probe`: which labels the experts of a finished run separate."""

import shutil
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results


def id_of(finished: CommandLine, arm: str) -> str:
    return Results(finished.folder / "results").folder(arm, 0).name


def test_tables_of_a_run_as_json(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "probe", id_of(finished, "top_k"), "--json")
    assert (ended.code, ended.err) == (0, "")
    report = ended.json
    assert (report["id"], report["arm"], report["seed"]) == (id_of(finished, "top_k"), "top_k", 0)
    tables, information = report["labels"]["tables"], report["labels"]["information"]
    assert set(tables) == {"domain", "position", "token"}
    domain = tables["domain"]
    assert domain["values"] == ["a", "b"]
    assert [sum(row) for row in domain["layers"]["1"]] == [4 * 32 * 2] * 2  # windows · tokens · experts of each
    metrics = Results(finished.folder / "results").result("top_k", 0)["metrics"]
    for kind, table in tables.items():
        assert table["information"]["1"] == pytest.approx(metrics[f"load/information/{kind}"])
        measured = information["kinds"][kind]["1"]  # of the same tokens, by the last checkpoint
        assert measured["plug_in_bits"] / measured["label_entropy_bits"] == pytest.approx(table["information"]["1"])
    assert set(information["kinds"]) == {*tables, "token_id", "previous_id", "next_id", "word_class"}
    assert information["kinds"]["token_id"]["1"]["controls"]["hash"]["of_routing"] == pytest.approx(1)


def test_a_run_as_text_and_as_a_figure(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    file = tmp_path / "labels.png"
    run = id_of(finished, "switch")
    ended = warm(finished, "probe", run, "--label", "token", "--permutations", "0", "--plot", str(file))
    assert (ended.code, ended.err) == (0, "")
    assert "token, I / H(label), not corrected: layer 1 0." in ended.out
    assert all(word in ended.out for word in ("word start", "inside word", "space", "experts of layer 1"))
    assert "domain" not in ended.out
    assert file.read_bytes().startswith(b"\x89PNG")


def test_arms_whose_tokens_all_use_as_many_experts_say_so(finished: CommandLine, warm: WarmCommandLine) -> None:
    for arm, line in {"dense": "dense is dense", "top_k": "every token of top_k uses the same number"}.items():
        ended = warm(finished, "probe", id_of(finished, arm), "--show", "compute")
        assert (ended.code, ended.err) == (0, "")
        assert line in ended.out


@pytest.mark.parametrize(
    ("arm", "more", "words"),
    [
        ("switch", ["--label", "tokens"], ["--label: 'tokens'", "Did you mean 'token"]),
        ("switch", ["--layer", "0"], ["--layer: '0'", "Allowed: 1"]),
        ("switch", ["--show", "label"], ["--show: 'label'", "Did you mean 'labels'"]),
        ("switch", ["--show", "labels,labels"], ["names a section twice"]),
        ("switch", ["--show", "gallery"], ["--show gallery", "--plot FILE"]),
        ("switch", ["--show", "gallery", "--plot", "x.png"], ["the task language has neither images nor recordings"]),
        ("switch", ["--show", "contexts,labels", "--plot", "x.png"], ["draws one section"]),
        ("switch", ["--arm", "switch"], ["--arm: applies to an experiment"]),
        ("switch", ["--plot", "nowhere/x.png"], ["--plot nowhere/x.png"]),
        ("dense", [], ["the router 'dense' of run", "has no experts"]),
        ("dense", ["--show", "contexts"], ["the router 'dense' of run", "has no experts"]),
        (None, [], ["run: 'nothing'", "Allowed:"]),
    ],
)
def test_a_mistake_in_probe(
    finished: CommandLine, warm: WarmCommandLine, arm: str | None, more: list[str], words: list[str]
) -> None:
    ended = warm(finished, "probe", "nothing" if arm is None else id_of(finished, arm), *more)
    assert (ended.code, ended.out) == (2, "")
    assert all(word in ended.err for word in words)
    assert ended.err.count("\n") == 1


def test_contexts_of_a_run(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "probe", id_of(finished, "top_k"), "--show", "contexts", "--markdown")
    assert (ended.code, ended.err) == (0, "")
    assert "**Expert 0 of layer 1: " in ended.out
    assert "⟦" in ended.out


def test_an_experiment_over_its_seeds(finished: CommandLine, warm: WarmCommandLine) -> None:
    options = ["--permutations", "5", "--json", "--arm", "top_k"]
    ended = warm(finished, "probe", "tiny.yaml", *options)
    assert ended.code == 0, ended.err
    labels = ended.json["labels"]
    assert labels["seeds"] == {"top_k": [0, 1, 2]}
    for row in labels["rows"]:
        assert len(row["bits"]["seeds"]) == 3
        assert row["bits"]["interval"][0] <= row["bits"]["mean"] <= row["bits"]["interval"][1]
    assert {part["name"] for part in labels["neighbours"]} == {
        "layer 1: previous_id minus token_id",
        "layer 1: next_id minus token_id",
        "layer 1: previous_id minus next_id",
    }
    assert "top_k, seed 2" in ended.err


def test_stored_tables_without_a_checkpoint(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    run = id_of(finished, "top_k")
    copy = tmp_path / "results"
    shutil.copytree(finished.folder / "results" / "runs" / run, copy / "runs" / run)
    shutil.rmtree(copy / "runs" / run / "checkpoints")
    ended = warm(finished, "probe", run, "--results", str(copy))
    assert ended.code == 0
    assert "stored tables only, without controls" in ended.out
    assert "experts of layer 1" in ended.out
    ended = warm(finished, "probe", run, "--results", str(copy), "--label", "token_id")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
