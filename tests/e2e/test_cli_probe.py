"""`moebench probe`: which labels the experts of a finished run separate."""

from pathlib import Path

import pytest
from support.command_line import CommandLine, Results, WarmCommandLine


def id_of(finished: CommandLine, arm: str) -> str:
    return Results(finished.folder / "results").folder(arm, 0).name


def test_tables_of_a_run_as_json(finished: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(finished, "probe", id_of(finished, "top_k"), "--json")
    assert (ended.code, ended.err) == (0, "")
    report = ended.json
    assert (report["id"], report["arm"], report["seed"]) == (id_of(finished, "top_k"), "top_k", 0)
    assert set(report["labels"]) == {"domain", "position", "token"}
    domain = report["labels"]["domain"]
    assert domain["values"] == ["a", "b"]
    assert [sum(row) for row in domain["layers"]["1"]] == [4 * 32 * 2] * 2  # windows · tokens · experts of each
    metrics = Results(finished.folder / "results").result("top_k", 0)["metrics"]
    for kind, table in report["labels"].items():
        assert table["information"]["1"] == pytest.approx(metrics[f"load/information/{kind}"])


def test_a_run_as_text_and_as_a_figure(finished: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    file = tmp_path / "labels.png"
    ended = warm(finished, "probe", id_of(finished, "switch"), "--label", "token", "--plot", str(file))
    assert (ended.code, ended.err) == (0, "")
    assert "token: layer 1 0." in ended.out
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
        ("switch", ["--label", "tokens"], ["--label: 'tokens'", "Did you mean 'token'"]),
        ("switch", ["--layer", "0"], ["--layer: '0'", "Allowed: 1"]),
        ("switch", ["--plot", "nowhere/x.png"], ["--plot nowhere/x.png"]),
        ("dense", [], ["labels.json", "has experts"]),
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
