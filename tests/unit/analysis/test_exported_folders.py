"""Folders of exported models: their tokenizer, shards, card and names, and when none is written."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.random_models import RandomRun
from support.run_folders import write_cell
from support.training_cases import write_text

import moebench
from moebench.analysis.exported_run import ExportOptions, export_run
from moebench.analysis.trained_run import TrainedRun
from moebench.errors import UsageError
from moebench.pretrained.export.folder_writer import write_folder
from moebench.pretrained.export.tensors import TensorSource
from moebench.pretrained.folder import open_pretrained
from moebench.pretrained.parent import read_parent
from moebench.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
SWIGLU = {"activation": "swiglu", "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def merge(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {**sections, "model": {**SWIGLU, **sections.get("model", {})}}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe4096", "own", "own without a separator"])
def test_the_tokenizer_has_the_same_ids(tmp_path: Path, text: Path, tokenizer: str) -> None:
    import transformers

    from moebench.tasks.text.embedded_tokenizer import train_bpe

    name = tokenizer
    if tokenizer.startswith("own"):
        trained = train_bpe(["ab 1 xyz 2 the mill"], 300)
        content = json.loads(trained.to_str())
        if "without" in tokenizer:
            content["added_tokens"][0]["content"] = "<pad>"
            content["model"]["vocab"] = {
                key.replace("<|endoftext|>", "<pad>"): n for key, n in content["model"]["vocab"].items()
            }
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text(json.dumps(content))
    sections = {"task": {"data": {"tokenizer": name}}, "router": "dense"}
    run: Any = RandomRun(tmp_path, text, **merge(sections))
    run.export(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    random = torch.Generator().manual_seed(0)
    texts = ["", "ab 1 xyz", " two  spaces\n\n\ttabs ", "Ünïcödé 漢字 \U0001f600", "ab<x>"]
    texts += ["".join(chr(int(c)) for c in torch.randint(1, 0xD7FF, (40,), generator=random)) for _ in range(20)]
    for each in texts:
        assert loaded(each)["input_ids"] == run.task.text.tokenizer.encode(each)[0].tolist()
        assert loaded.decode(loaded(each)["input_ids"]) == each
    assert loaded.eos_token_id == run.task.text.separator
    parent = read_parent(open_pretrained(f"hf:{tmp_path / 'out'}", requires_experts=False))
    expected = str(tmp_path / "out" / "tokenizer.json") if "own" in tokenizer else tokenizer
    assert parent.settings["task"] == {"data": {"tokenizer": expected}}
    assert parent.vocab_size == run.task.vocab_size


def test_large_models_are_divided_and_types_are_rounded(tmp_path: Path, text: Path) -> None:
    run = RandomRun(tmp_path, text, **merge({"router": "loss_free"}))
    source = TensorSource(weights=run.model.state_dict(), dtype=torch.bfloat16)
    files = write_folder(tmp_path / "out", {"config.json": "{}"}, source, max_shard_bytes=4000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        assert shard.stat().st_size < 3 * 4000
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == shard.name
                stored[name] = file.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    for name, value in run.model.state_dict().items():
        dtype = torch.float32 if name.endswith("bias_E") else torch.bfloat16  # a selection bias is not rounded
        assert torch.equal(stored[name], value.to(dtype))


def test_the_model_card_has_no_markup_of_the_run(tmp_path: Path, text: Path) -> None:
    from moebench.pretrained.export.model_card import escape

    run = RandomRun(tmp_path, text, **merge({"router": "mixtral"}))
    run.export(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| arm | switch |" in card
    assert 'AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)' in card
    assert "None: these are not the weights of a finished run." in card
    assert escape("<script>\n| [a](b) `c` *d*") == r"\<script\> | \[a\](b) \`c\` \*d\*"


def test_an_output_folder_is_never_half_written_nor_replaced_by_accident(tmp_path: Path, text: Path) -> None:
    run = RandomRun(tmp_path / "results", text, **merge({"router": "mixtral"}))
    out = tmp_path / "models" / "one"
    run.export(out)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    with pytest.raises(UsageError, match=r"--out .*one: is not empty \(README.md\); give a new folder, or --force"):
        run.export(out)
    run.export(out, force=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(
        UsageError, match=r"has thesis.tex, which no export wrote; --force replaces exported models only"
    ):
        run.export(out, force=True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["one"]
    (tmp_path / "link").symlink_to(out)
    for path in (tmp_path / "link", out / "config.json"):
        with pytest.raises(UsageError, match="is no folder; give the name of a new one"):
            run.export(path)
    for key, value, reason in (("format", "gguf", "--format: 'gguf' is unknown"), ("dtype", "int8", "--dtype: 'int8'")):
        with pytest.raises(UsageError, match=reason):
            ExportOptions(out=tmp_path / "new", **{key: value}).check()


def test_a_disk_that_is_too_small_leaves_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RandomRun(tmp_path / "results", text, **merge({"router": "mixtral"}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match=r"--out .*: needs 16.* MiB, and .* are free"):
        run.export(tmp_path / "models" / "one")
    assert list((tmp_path / "models").iterdir()) == []


def test_other_data_is_written_with_our_names(tmp_path: Path, text: Path) -> None:
    run = RandomRun(tmp_path, text, router="switch", task={"name": "clustered", "sequence_length": 16})
    with pytest.raises(UsageError, match=r"task\.name=clustered: only language models of text are written for it"):
        run.export(tmp_path / "out")
    exported = run.export(tmp_path / "out", format="safetensors")
    assert [file.name for file in exported.files] == ["README.md", "config.json", "model.safetensors"]
    model, _ = moebench.load_model(f"hf:{tmp_path / 'out'}", tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in run.model.state_dict().items())


def test_a_run_that_is_not_done_has_only_its_kept_weights(tmp_path: Path, text: Path) -> None:
    run = RandomRun(tmp_path, text, router="switch")
    folder = RunFolder.of(tmp_path, "random")
    write_cell(folder.path)
    opened = TrainedRun(folder=folder, cell=folder.read_cell(), config=run.config, task=run.task)
    with pytest.raises(
        UsageError, match=r"run random is .* \(allowed: a run that is done, or --step of kept weights: none"
    ):
        export_run(opened, ExportOptions(out=tmp_path / "out"), tmp_path)
