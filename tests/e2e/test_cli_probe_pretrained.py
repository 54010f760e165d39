"""`moebench probe hf:PATH`: the report of a model of transformers, on the command line."""

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.pretrained_models import change_config, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "qwen3_moe")
    return folder


SMALL = ("--data", "text", "--tokens", "600", "--sequence-length", "32", "--permutations", "5")


def test_sections_as_json(cli: CommandLine, warm: WarmCommandLine, model: Path) -> None:
    ended = warm(cli, "probe", f"hf:{model}", "--show", "labels,contexts,loads", *SMALL, "--json")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["subject"] == f"hf:{model}"
    described = report["labels"]["model"]
    assert described["model_type"] == "qwen3_moe"
    assert described["layers"] == {
        "0": {"experts": 8, "experts_per_token": 2},
        "2": {"experts": 8, "experts_per_token": 2},
    }
    assert described["domains"] == ["a", "b"]
    tokens = report["labels"]["information"]["tokens"]
    assert 500 < tokens <= 600
    for layer, values in report["loads"]["layers"].items():
        assert sum(values["load"]) == 2 * tokens
        domain = report["labels"]["tables"]["domain"]["layers"][layer]
        assert [sum(column) for column in zip(*domain, strict=True)] == values["load"]
        assert set(report["labels"]["information"]["kinds"]["domain"][layer]["controls"]) == {
            "untrained",
            "hash",
            "random",
        }
    assert len(report["contexts"]["experts"]) == 8
    assert report["contexts"]["layer"] == "2"


def test_a_model_as_text_and_as_a_figure(cli: CommandLine, warm: WarmCommandLine, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.png"
    arguments = (*SMALL, "--label", "domain", "--dtype", "bfloat16", "--plot", str(file))
    ended = warm(cli, "probe", f"hf:{model}", *arguments, draws_figures=True)
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.split())
    assert "Qwen3-MoE: 72.0k parameters (0 MiB in bfloat16), 2 MoE layers of 8 experts, 2 per token" in text
    assert "bits per byte" in text
    assert "of the same routers with weights drawn again" in text
    assert "word_class" not in text
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--show", "history"),
            "--show history: does not apply to a checkpoint (hf:PATH) (allowed: labels, contexts, loads)",
        ),
        (("--layer", "1"), "--layer: '1' is unknown. Allowed: 0, 2"),
        (("--label", "phone"), "--label: 'phone' is unknown."),
        (("--dtype", "int4"), "--dtype: 'int4' is unknown."),
        (("--data", "nowhere"), "--data: 'nowhere' does not exist"),
        (("--show", "loads", "--plot", "x.png"), "--plot x.png: the section loads has no figure"),
        (("--arm", "switch"), "--arm: applies to an experiment, and the subject is a checkpoint (hf:PATH)"),
    ],
)
def test_a_mistake_in_the_arguments(
    cli: CommandLine, warm: WarmCommandLine, model: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = warm(cli, "probe", f"hf:{model}", *SMALL, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1


def test_a_mistake_in_the_folder(cli: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "olmoe")
    change_config(tmp_path / "model", vocab_size=100)
    for subject, words in {
        "hf:allenai/OLMoE-1B-7B": "is no local folder; nothing is downloaded",
        f"hf:{tmp_path / 'model'}": "the tokenizer is that of another model",
    }.items():
        ended = warm(cli, "probe", subject)
        assert (ended.code, ended.out) == (2, "")
        assert words in ended.err
        assert ended.err.count("\n") == 1


def test_options_of_a_checkpoint_are_refused_for_a_run(cli: CommandLine, warm: WarmCommandLine) -> None:
    ended = warm(cli, "probe", "abc", "--dtype", "float32")
    assert (ended.code, ended.out) == (2, "")
    assert "--dtype, --batch-size, --sequence-length: apply to hf:PATH, and the subject is a run" in ended.err
