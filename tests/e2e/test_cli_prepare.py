"""`moebench prepare`, `verify` of its folder, and training on it, from the command line."""

import json

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results, deterministic_points

PREPARE = ("prepare", "text", "--out", "tokens", "--validation", "0.3", "--test", "0.3", "--split-by", "block")
TOKENS = ("task.data.path=tokens", "task.data.tokenizer=bpe4096")
"""The tokenizer is that of the folder; the experiment of the tests names another one."""


def test_text_is_prepared_checked_and_trained_on(cli: CommandLine, warm: WarmCommandLine) -> None:
    prepared = warm(cli, *PREPARE, "--tokenizer", "train:300", "--json")
    assert prepared.code == 0, prepared.err
    assert prepared.json["vocab_size"] == 300
    assert prepared.err.startswith("reading the sample: ")  # plain lines where there is no terminal
    again = warm(cli, *PREPARE, "--tokenizer", "train:300")
    assert "was ready" in again.out
    mismatch = warm.train(cli, "task.data.path=tokens", "seeds=[0]")
    assert "task.data.tokenizer: 'bytes' was given, but 'tokens' is a prepared folder" in mismatch.err + mismatch.out
    trained = warm.train(cli, *TOKENS, "seeds=[0]")
    assert trained.code == 0, trained.err
    results = Results(cli.folder / "results")
    assert results.result("switch", 0)["metrics"]["bits_per_byte"] > 0
    assert warm(cli, "verify", "tokens").code == 0
    with (cli.folder / "tokens" / "tokens-00000.bin").open("r+b") as file:
        file.write(b"\xff")
    damaged = warm(cli, "verify", "tokens", "--json")
    assert (damaged.code, len(damaged.json["problems"])) == (1, 1)
    refused = warm.train(cli, *TOKENS, "seeds=[1]")
    assert refused.code != 0
    assert "tokens-00000.bin is newer than manifest.json" in refused.err + refused.out


@pytest.mark.slow
def test_two_processes_train_on_it_as_one_does(cli: CommandLine) -> None:
    assert cli(*PREPARE, "--tokenizer", "train:300").code == 0
    losses = []
    for processes in ("1", "2"):
        options = (*TOKENS, "seeds=[0]", f"parallel.data={processes}", "grid.router=[dense]")
        assert cli.train(*options, results=processes).code == 0
        points = deterministic_points(Results(cli.folder / processes).folder("dense", 0))
        losses.append([metrics["loss/task"] for _, metrics in points if "loss/task" in metrics])
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "texts", "--out", "x"), "error: DATA: 'texts' does not exist. Did you mean 'text'?"),
        (("prepare", "text"), "error: Missing option '--out'"),
        (("prepare", "--out", "x"), "error: DATA must be files, or --dataset, got nothing"),
        (("prepare", "text", "--out", "x", "--tokenizer", "no.json"), "error: --tokenizer: 'no.json' does not exist"),
        (("prepare", "rows.jsonl", "--out", "x"), "error: --text-column: there is no column 'text' in rows.jsonl"),
        (("prepare", "text", "--out", "text"), "error: --out: 'text' is not empty (it has 'a')"),
        (("verify", "text"), "error: 'text' is not a prepared folder: it has no manifest.json"),
    ],
)
def test_mistakes_are_one_line(cli: CommandLine, warm: WarmCommandLine, arguments, message) -> None:
    (cli.folder / "rows.jsonl").write_text(json.dumps({"txt": "a"}))
    refused = warm(cli, *arguments)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith(message)
    assert not (cli.folder / "x").exists()
