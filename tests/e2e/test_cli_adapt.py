"""`moebench adapt`: one run on a domain or on other data, its gain and forgetting, and what is refused."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

import moebench

STAGES: list[dict[str, Any]] = [
    {"name": "train", "base": {"task": {"data": {"held_out_domains": ["b"]}}}},
    {"name": "adapt", "base": {"task": {"data": {"held_out_domains": ["a"]}}, "train": {"steps": 4}}},
]


@pytest.fixture
def trained(
    built_once: Callable[[str, Callable[[Path], Any]], Path], cli: CommandLine, warm: WarmCommandLine
) -> tuple[CommandLine, str]:
    """Return a folder with a run that was trained on the domain a, and the id of the run."""
    shutil.copytree(built_once("adapted run", partial(train, warm)), cli.folder, dirs_exist_ok=True)
    (run,) = Results(cli.folder / "results").folders()
    return cli, run.name


def train(warm: WarmCommandLine, folder: Path) -> None:
    """Train one run on the domain a."""
    command_line = CommandLine(folder)
    command_line.write(grid={"router": ["switch"]}, seeds=[0], baseline=None)
    run = warm.train(command_line, "task.data.held_out_domains=[b]")
    assert run.code == 0, run.err


def adapt(warm: WarmCommandLine, cli: CommandLine, *arguments: str) -> Any:
    return warm(cli, "adapt", *arguments, "--tracker", "none")


def test_a_run_is_adapted_to_a_domain_once(trained: tuple[CommandLine, str], warm: WarmCommandLine) -> None:
    cli, parent = trained
    arguments = (parent[:6], "--to", "b", "--trainable", "experts", "--examples", "20", "--steps", "5")
    run = adapt(warm, cli, *arguments, "--json")
    assert run.code == 0, run.err
    (child,) = run.json["trained"]
    config = json.loads((cli.folder / "results" / "runs" / child / "cell.json").read_text())["config"]
    assert config["init"]["from"] == f"run:{parent}"
    assert config["task"]["data"]["held_out_domains"] == ["a"]
    assert (config["task"]["train_windows"], config["train"]["trainable"], config["train"]["steps"]) == (
        20,
        "experts",
        5,
    )
    (arm,) = run.json["transfer"]["arms"].values()
    assert (arm["target"], arm["sources"]) == (["b"], ["a"])
    metrics = {name: Results(cli.folder / "results").path / "runs" / name / "result.json" for name in (parent, child)}
    before, after = (json.loads(file.read_text())["metrics"] for file in metrics.values())
    assert arm["gain"]["mean"] == pytest.approx(before["bits_per_byte/b"] - after["bits_per_byte/b"])
    assert arm["forgetting"]["mean"] == pytest.approx(after["bits_per_byte/a"] - before["bits_per_byte/a"])
    again = adapt(warm, cli, *arguments)
    assert again.code == 0
    assert "Transfer: bits per byte on test text, run beside its parent" in again.out
    assert len(Results(cli.folder / "results").folders()) == 2


def test_several_rates_are_tried_and_other_data_are_measured_by_both_models(
    trained: tuple[CommandLine, str], warm: WarmCommandLine
) -> None:
    cli, parent = trained
    for number in range(6):
        file = cli.folder / "notes" / f"note{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(" ".join(f"{number}{word} klm" for word in range(400)))
    rates = ("--learning-rate", "0.001,0.01", "--steps", "4", "task.data.domain_column=null")
    run = adapt(warm, cli, parent, "--to", "notes", *rates, "--json")
    assert run.code == 0, run.err
    assert len(run.json["tuning"]["trained"]) == 2
    (arm,) = run.json["transfer"]["arms"].values()
    assert arm["sources"] == ["a"]
    assert arm["parent_source"] == pytest.approx(
        json.loads((cli.folder / "results" / "runs" / parent / "result.json").read_text())["metrics"]["bits_per_byte/a"]
    )
    assert None not in (arm["gain"], arm["forgetting"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "c"), "--to c: is no domain of the run's data and no file or folder. Domains: a, b"),
        (("--to", "b", "--examples", "0"), "--examples must be at least 1"),
        (("--to", "b", "--learning-rate", "fast"), "--learning-rate: 'fast' was given"),
        (("--to", "b", "train.stepz=3"), "train.stepz"),
        (("--to", "a", "--examples", "100000"), "task.train_windows must be at most"),
        (("--to", "b", "model.d_model=32"), "model.d_model: 32 here, 16 in run"),
    ],
)
def test_mistakes_are_one_line(
    trained: tuple[CommandLine, str], warm: WarmCommandLine, arguments: tuple[str, ...], message: str
) -> None:
    cli, parent = trained
    run = adapt(warm, cli, parent, *arguments)
    assert run.code == 2
    assert message in run.err
    assert run.err.count("\n") <= 2
    assert len(Results(cli.folder / "results").folders()) == 1


def test_another_vocabulary_is_refused(trained: tuple[CommandLine, str], warm: WarmCommandLine) -> None:
    cli, parent = trained
    prepared = warm(cli, "prepare", "text", "--out", "prepared", "--tokenizer", "bpe4096")
    assert prepared.code == 0, prepared.err
    run = adapt(warm, cli, parent, "--to", "prepared")
    assert run.code == 2
    assert "its vocabulary of 4,096 tokens is another than that of the run, 257 tokens" in run.err


def test_compare_and_the_report_show_the_transfer_of_stages(
    cli: CommandLine, warm: WarmCommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.write(stages=STAGES, grid={"router": ["dense", "switch"]}, seeds=[0])
    assert warm.train(cli).code == 0
    compared = warm(cli, "compare", "./tiny.yaml", "--json").json
    arms = compared["transfer"]["arms"]
    assert arms["switch"]["reference"] == "dense"
    monkeypatch.chdir(cli.folder)
    transfer = moebench.measure_transfer("./tiny.yaml", "results")
    assert transfer is not None
    assert json.loads(json.dumps(transfer.to_dict())) == compared["transfer"]
    gain = {arm: values["parent_target"] - values["child_target"] for arm, values in arms.items()}
    assert arms["switch"]["gain_difference"]["mean"] == pytest.approx(gain["switch"] - gain["dense"])
    text = warm(cli, "compare", "./tiny.yaml").out
    assert "Transfer: bits per byte on test text, run beside its parent" in text
    assert "target b, sources a." in text
    report = warm(cli, "report", "./tiny.yaml", "--out", "page.html")
    assert report.code == 0, report.err
    assert "Transfer: bits per byte on test text" in (cli.folder / "page.html").read_text()


@pytest.mark.slow
def test_arms_with_different_targets_have_a_transfer_and_no_verdict(cli: CommandLine, warm: WarmCommandLine) -> None:
    targets = [{"label": "to b", "held_out_domains": ["a"]}, {"label": "to a", "held_out_domains": ["b"]}]
    stages = [STAGES[0], {"name": "adapt", "base": {"train": {"steps": 4}}, "grid": {"task.data": targets}}]
    cli.write(stages=stages, grid={"router": ["dense", "switch"]}, seeds=[0], baseline=None)
    assert warm.train(cli).code == 0
    compared = warm(cli, "compare", "./tiny.yaml", "--json")
    assert compared.code == 0, compared.err
    assert any("2 arms with other data than 'dense, to b'" in note for note in compared.json["notes"])
    # The parent has seen the other target already: nothing is transferred.
    assert set(compared.json["transfer"]["arms"]) == {"dense, to b", "switch, to b"}
