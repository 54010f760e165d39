"""Speech from the command line: a tiny run on recordings that the test writes, and mistakes in one line."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results
from support.tiny_experiment import tiny

LETTERS = {"a": 400, "b": 900, "c": 1800}


def tones(word: str) -> np.ndarray:
    second = np.arange(1600) / 8000
    return np.concatenate([0.3 * np.sin(2 * np.pi * LETTERS[letter] * second) for letter in word])


def write_recordings(folder: Path) -> None:
    """Write the same 18 words as a table, and files that are broken in several ways."""
    words = [x + y for x in "abc" for y in "abc"] + [x + y + x for x in "abc" for y in "abc"]
    (folder / "clips").mkdir()
    for word in words:
        soundfile.write(folder / "clips" / f"{word}.wav", tones(word), 8000)
    audio = [{"bytes": (folder / "clips" / f"{word}.wav").read_bytes(), "path": f"{word}.wav"} for word in words]
    rows = {"audio": audio, "text": words, "language": ["xy"[i % 2] for i in range(18)], "first": [w[0] for w in words]}
    pq.write_table(pa.table(rows), folder / "words.parquet")
    audio[4] = {"bytes": b"RIFF no sound", "path": "4.wav"}
    pq.write_table(pa.table(rows), folder / "broken.parquet")
    (folder / "not.parquet").write_bytes(b"PAR1 no")
    with (folder / "gone.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text"], ["clips/ab.wav", "ab"], ["clips/gone.wav", "gone"]])
    (folder / "nothing").mkdir()


def experiment(name: str, **task: Any) -> dict[str, Any]:
    experiment = tiny(seeds=[0], grid={"router": ["dense", "switch"]})
    experiment["base"]["task"] = {"name": name, "data": {"path": "words.parquet", **task}}
    experiment["base"]["train"]["batch_size"] = 4
    return experiment


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    cli = CommandLine(tmp_path_factory.mktemp("speech"))
    write_recordings(cli.folder)
    (cli.folder / "speech.yaml").write_text(json.dumps(experiment("speech")))
    (cli.folder / "keyword.yaml").write_text(json.dumps(experiment("keyword", target_column="first")))
    yield cli
    cli.kill_leftovers()


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("speech", {"cer", "wer", "nats"}),
        pytest.param("keyword", {"accuracy", "nats"}, marks=pytest.mark.slow),
    ],
)
def test_a_tiny_run(work: CommandLine, warm: WarmCommandLine, name: str, metrics: set[str]) -> None:
    results = f"results_{name}"
    ended = warm.train(work, name=f"./{name}.yaml", results=results)
    assert ended.code == 0, ended.err
    results_of = Results(work.folder / results)
    assert results_of.statuses() == {("dense", 0): "done", ("switch", 0): "done"}
    for arm in ("dense", "switch"):
        result = results_of.result(arm, 0)
        values = {key: value for key, value in result["metrics"].items() if not key.startswith("load/")}
        assert set(values) == {key + domain for key in metrics for domain in ("", "/x", "/y")}
        assert all(math.isfinite(value) for value in values.values())
        # 18 words of 2 or 3 letters of 200 ms: 10 or 15 positions; 12 steps of 4.
        assert 12 * 4 * 10 <= result["cost"]["train_tokens"] <= 12 * 4 * 15
    compared = warm(work, "compare", f"./{name}.yaml", "--results", results, "--json")
    assert compared.code == 0, compared.err
    planned = warm(work, "plan", f"./{name}.yaml", "--results", results, "--json")
    cells = {cell["arm"]: cell for cell in planned.json["cells"]}
    assert cells["dense"]["train_tokens"] == results_of.result("dense", 0)["cost"]["train_tokens"]


MISTAKES = {
    "task.data.path=nosuch": ["task.data.path", "'nosuch'", "does not exist"],
    "task.data.path=not.parquet": ["task.data.path", "'not.parquet'", "cannot be read"],
    "task.data.path=nothing": ["task.data.path", "'nothing'", "has no file", ".flac"],
    "task.data.path=broken.parquet": ["task.data.path", "row 4 (4.wav)", "task.data.skip_broken=true"],
    "task.data.path=gone.csv": ["task.data.path", "clips/gone.wav", "no such file"],
    "task.data.path=clips": ["'aa.wav' has no transcript", "aa.txt"],
    "task.data.target_column=txt": ["task.data.target_column", "Did you mean 'text'?", "audio, text, language, first"],
    "task.data.sample_rate=0": ["task.data.sample_rate", "between 4000 and 192000"],
    "task.data.digits=spell": ["task.data.digits", "spell"],
    "task.stack=0": ["task.stack", "between 1 and 16"],
    "task.sequence_length=64": ["task.sequence_length", "task 'speech' has no key"],
    "task.name=keyword": ["task.data.path", "no embedded labelled audio"],
    "task={name: keyword, data: {path: words.parquet}}": ["task.data.target_column", "no column 'label'"],
    "task={name: keyword, data: {path: words.parquet, target_column: text}}": ["class 'aa' has 1 group(s)"],
}


@pytest.mark.parametrize(("override", "words"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_reported_in_one_line(
    work: CommandLine, warm: WarmCommandLine, override: str, words: list[str]
) -> None:
    ended = warm(work, "run", "./speech.yaml", override, "--results", "refused", "--tracker", "none", timeout=60)
    assert ended.code == 2, ended.err[-1500:]
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert not list((work.folder / "refused").glob("runs/*"))
