"""`moebench export` on trained runs: in transformers and back in moebench, the same bits per byte on the test split."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.command_line import FIXTURE_TIMEOUT_S, CommandLine, WarmCommandLine
from support.tiny_experiment import tiny

import moebench
from moebench.tasks.language import Language

ARMS = {"mixtral": "mixtral", "deepseek_v3": "glm4_moe", "top_p": None}
"""Router -> the architecture of transformers, None where it has none."""


def train(warm: WarmCommandLine, folder: Path) -> None:
    command_line = CommandLine(folder)
    model = {"d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 128, "activation": "swiglu"}
    routers = [{"name": name, "top_k": 2} if name == "deepseek_v3" else name for name in ARMS]
    command_line.write(
        **tiny(
            base={"model": model, "layout": {"name": "every_n", "n": 1, "num_experts": 4}},
            grid={"router": routers},
            seeds=[0],
            baseline="mixtral",
            train={"keep_checkpoints": [6], "learning_rate": 0.02},
        )
    )
    try:
        ended = warm.train(command_line, timeout=FIXTURE_TIMEOUT_S)
    finally:
        command_line.kill_leftovers()
    assert ended.code == 0, ended.err


@pytest.fixture(scope="module")
def trained(built_once: Callable[[str, Callable[[Path], Any]], Path], warm: WarmCommandLine) -> CommandLine:
    """One seed of mixtral, deepseek_v3 and top_p, with swiglu."""
    return CommandLine(built_once("exported_runs", partial(train, warm)))


def find_runs(cli: CommandLine) -> dict[str, Path]:
    folders = (cli.folder / "results" / "runs").iterdir()
    return {json.loads((folder / "cell.json").read_text())["arm"]: folder for folder in folders}


def measure_in_transformers(folder: Path, task: Language) -> float:
    """Return the bits per byte on the test split, computed with the model of transformers alone."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    bits, num_bytes = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch in task.eval_batches("test", 4):
        with torch.no_grad():
            log_probability_BLV = model(batch.input_BL).logits.log_softmax(-1)
        nats_BL = -log_probability_BLV.gather(-1, batch.target_BP.unsqueeze(-1)).squeeze(-1).double()
        bits.index_add_(0, batch.domain_B, nats_BL.sum(1) / math.log(2))
        num_bytes.index_add_(0, batch.domain_B, batch.weight_BP.sum(1).double())
    return float((bits / num_bytes).mean())  # the mean over domains


def test_a_dense_run_has_the_same_bits_per_byte_and_generates_to_the_end_of_a_document(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    run, out = find_runs(finished)["dense"], tmp_path / "out"
    exported = warm(finished, "export", run.name, "--out", str(out), "--json")
    assert exported.code == 0, exported.err
    assert exported.json["model_type"] == "arcee"  # Llama without the gate of its networks, for gelu
    assert sorted(Path(file).name for file in exported.json["files"]) == sorted(path.name for path in out.iterdir())
    monkeypatch.chdir(finished.folder)  # the path of the data is relative
    task = moebench.load_model(run)[1]
    assert isinstance(task, Language)
    expected = json.loads((run / "result.json").read_text())["metrics"]["bits_per_byte"]
    assert measure_in_transformers(out, task) == pytest.approx(expected, abs=1e-6)
    assert "| bits_per_byte |" in (out / "README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    generated = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("abc")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_a_sparse_run_with_gelu_is_refused_in_one_line(
    finished: CommandLine, warm: WarmCommandLine, tmp_path: Path
) -> None:
    refused = warm(finished, "export", find_runs(finished)["top_k"].name, "--out", str(tmp_path / "out"))
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "model.activation is gelu" in refused.err
    assert "; --format safetensors writes its weights" in refused.err
    assert list(tmp_path.iterdir()) == []
    missing = warm(finished, "export", find_runs(finished)["top_k"].name, "--out", str(tmp_path / "out"), "--step", "7")
    assert (missing.code, missing.out) == (2, "")
    assert "has no weights of this step; allowed: 12 (train.keep_checkpoints keeps more)" in missing.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("arm", ARMS)
def test_an_exported_run_has_the_same_bits_per_byte(
    trained: CommandLine, warm: WarmCommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    run, out = find_runs(trained)[arm], tmp_path / "out"
    expected = json.loads((run / "result.json").read_text())["metrics"]["bits_per_byte"]
    exported = warm(trained, "export", run.name, "--out", str(out), "--json")
    monkeypatch.chdir(trained.folder)  # the path of the data is relative
    if ARMS[arm] is None:
        assert exported.code == 2
        assert "cannot express" in exported.err
        assert "; --format safetensors writes its weights" in exported.err
        assert not out.exists()
    else:
        assert exported.code == 0, exported.err
        assert exported.json["model_type"] == ARMS[arm]
        assert sorted(Path(file).name for file in exported.json["files"]) == sorted(path.name for path in out.iterdir())
        task = moebench.load_model(run)[1]
        assert isinstance(task, Language)
        assert measure_in_transformers(out, task) == pytest.approx(expected, abs=1e-6)
    own = warm(trained, "export", run.name, "--out", str(tmp_path / "own"), "--format", "safetensors")
    assert own.code == 0, own.err
    assert f"continue from it: init.from=hf:{tmp_path / 'own'}" in own.out
    stored, loaded = moebench.load_model(run)[0], moebench.load_model(f"hf:{tmp_path / 'own'}")[0]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in stored.state_dict().items())


@pytest.mark.slow
def test_kept_weights_are_exported_by_their_step(trained: CommandLine, warm: WarmCommandLine, tmp_path: Path) -> None:
    run = find_runs(trained)["mixtral"]
    for step, out in ((6, tmp_path / "six"), (12, tmp_path / "twelve")):
        done = warm(trained, "export", run.name[:6], "--out", str(out), "--step", str(step))
        assert done.code == 0, done.err
        assert f"mixtral of run {run.name}, step {step}, " in done.out
    assert (tmp_path / "six" / "model.safetensors").read_bytes() != (
        tmp_path / "twelve" / "model.safetensors"
    ).read_bytes()
    assert "not the weights of a finished run" in (tmp_path / "six" / "README.md").read_text()
    assert "| bits_per_byte |" in (tmp_path / "twelve" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_continues_from_an_exported_one_starts_with_its_bits_per_byte(
    trained: CommandLine, warm: WarmCommandLine, tmp_path: Path
) -> None:
    run, out = find_runs(trained)["mixtral"], tmp_path / "out"
    assert warm(trained, "export", run.name, "--out", str(out)).code == 0
    settings = yaml.safe_load(warm(trained, "show", f"hf:{out}").out)["base"]
    task = {"name": "language", "sequence_length": 32, "eval_windows": 4}
    data = {**settings["task"]["data"], "path": "text"}
    base = {**settings, "task": {**task, "data": data}}
    train = {"steps": 1, "learning_rate": 1e-9, "warmup_steps": 0, "eval_every": 1, "checkpoint_every": 1}
    child = CommandLine(tmp_path)
    child.write(**tiny(base=base, grid={"router": ["mixtral"]}, seeds=[0], baseline="mixtral", train=train))
    try:
        ended = warm.train(child, timeout=FIXTURE_TIMEOUT_S)
    finally:
        child.kill_leftovers()
    assert ended.code == 0, ended.err
    values = [
        json.loads((folder / "result.json").read_text())["metrics"]["bits_per_byte"]
        for folder in (run, find_runs(child)["mixtral"])
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-6)
