"""Folders of transformers: what is read, and what is refused in one line before a weight is loaded."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pretrained_models import OPTIONS, change_config, save_model, write_model, write_tokenizer

from moebench.errors import UsageError
from moebench.pretrained.families import FAMILIES
from moebench.pretrained.folder import open_pretrained
from moebench.pretrained.library import NEEDED
from moebench.pretrained.memory import require_memory
from moebench.pretrained.model import choose_dtype, load_model
from moebench.pretrained.tokenizer import read_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", "mixtral")
    return tmp_path / "model"


def name(path: Path) -> str:
    return f"hf:{path}"


def read_all(path: Path) -> None:
    opened = open_pretrained(name(path))
    read_tokenizer(opened)
    load_model(opened)


def refusal(path: Path) -> str:
    """Return the one line with which a folder is refused, by its check or by loading its model and tokenizer."""
    with pytest.raises(UsageError) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_family_has_a_small_model() -> None:
    assert sorted(OPTIONS) == sorted(FAMILIES)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_a_loaded_model_has_the_stored_values_in_one_file_or_in_shards(tmp_path: Path, model_type: str) -> None:
    written = write_model(tmp_path / "one", model_type)
    save_model(written, tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for path in (tmp_path / "one", tmp_path / "shards"):
        model = load_model(open_pretrained(name(path)))
        assert not model.module.training
        assert not model.unused
        stored = written.state_dict()
        assert stored.keys() == model.module.state_dict().keys()
        assert all(torch.equal(value, stored[key]) for key, value in model.module.state_dict().items())


def test_layers_are_named_by_their_position_among_all_blocks(tmp_path: Path) -> None:
    names = {
        model_type: [str(layer) for layer in load_model(_written(tmp_path / model_type, model_type)).routers]
        for model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "switch_transformers")
    }
    assert names == {
        "mixtral": ["0", "1", "2"],
        "qwen2_moe": ["1"],  # every second layer
        "qwen3_moe": ["0", "2"],  # layer 1 is dense
        "deepseek_v3": ["1", "2"],  # the first one is dense
        "switch_transformers": ["encoder.1", "encoder.3", "decoder.1", "decoder.3"],
    }


def _written(path: Path, model_type: str):  # type: ignore[no-untyped-def]
    write_model(path, model_type)
    return open_pretrained(name(path))


def test_the_type_is_the_stored_one_or_the_chosen_one(tmp_path: Path) -> None:
    write_model(tmp_path / "half", "olmoe", lambda model: model.to(torch.bfloat16))
    opened = open_pretrained(name(tmp_path / "half"))
    assert load_model(opened).dtype == torch.bfloat16
    assert load_model(opened, "float32").dtype == torch.float32
    with pytest.raises(UsageError, match="--dtype: 'int8' is unknown"):
        choose_dtype(opened, "int8")


def test_missing_and_old_libraries_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDED, "transformers", (99, 0))
    with pytest.raises(
        UsageError, match=r"hf: needs transformers>=99\.0, and 5.* is installed \(pip install 'moebench"
    ):
        open_pretrained(name(folder))
    monkeypatch.setitem(NEEDED, "no-such-library", (1, 0))
    monkeypatch.delitem(NEEDED, "transformers")
    with pytest.raises(UsageError, match=r"hf: needs no-such-library>=1\.0 \(pip install 'moebench\[hf\]'\)"):
        open_pretrained(name(folder))


def test_what_is_no_local_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("mistralai/Mixtral-8x7B-v0.1", str(tmp_path / "file"), str(tmp_path / "none"), "", "a\0b"):
        with pytest.raises(UsageError, match="is no local folder; nothing is downloaded"):
            open_pretrained(f"hf:{path}")


def _without_config(path: Path) -> None:
    (path / "config.json").unlink()


def _config_text(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "config.json").write_text(text) and None


def _keys(**values: object) -> Callable[[Path], None]:
    return lambda path: change_config(path, **values)


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _truncated(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])


def _endless_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _pipe(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def _without_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.gate.weight"]
    save_file(tensors, path / "model.safetensors")


def _quantised(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file({key: value.to(torch.int8) for key, value in tensors.items()}, path / "model.safetensors")


def _other_vocabulary(path: Path) -> None:
    change_config(path, vocab_size=330)


def _large_tokenizer(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 290, "content": "<x>"})
    (path / "tokenizer.json").write_text(json.dumps(content))
    change_config(path, vocab_size=288)


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").rename(path / "tokenizer.model")


def _adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (_without_config, "config.json: does not exist"),
    "no JSON": (_config_text("{"), "config.json: is no JSON file"),
    "deep JSON": (_config_text("[" * 200_000), "config.json: is no JSON file (nested too deeply)"),
    "a list": (_config_text("[]"), "config.json: is a list; allowed: a JSON object"),
    "dense": (
        _keys(model_type="llama", architectures=["LlamaForCausalLM"], num_local_experts=None, num_experts_per_tok=None),
        "the model_type 'llama' has no experts",
    ),
    "without experts": (_keys(num_local_experts=0), "this Mixtral model has no experts (0 experts in 3 layers)"),
    "misspelt": (_keys(model_type="mixtrall"), "the model_type 'mixtrall' is unknown. Did you mean 'mixtral'? Allowed"),
    "another type": (_keys(model_type=3), "the model_type 3 is unknown"),
    "another head": (_keys(architectures=["MixtralForTokenClassification"]), "allowed: MixtralForCausalLM"),
    "quantised": (_keys(quantization_config={"quant_method": "fp8"}), "has quantization_config"),
    "layers in words": (_keys(num_hidden_layers="many"), "num_hidden_layers is 'many', not a number"),
    "endless layers": (_keys(num_hidden_layers=2**30), "num_hidden_layers is 1073741824, which 96 tensors cannot have"),
    "endless experts": (_keys(num_local_experts=2**30), "num_local_experts is 1073741824"),
    "endless vocabulary": (_keys(vocab_size=2**30), "vocab_size is 1073741824"),
    "unknown activation": (_keys(hidden_act="no_such"), "transformers cannot build it"),
    "heads of another type": (_keys(num_attention_heads="four"), "config.json: transformers refuses it"),
    "pickled": (_pickled, "pytorch_model.bin: not read, since loading it may run code"),
    "no weights": (_no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    "truncated": (_truncated, "model.safetensors: is damaged or no safetensors file"),
    "endless header": (_endless_header, "model.safetensors: is damaged or no safetensors file"),
    "a pipe": (_pipe, "model.safetensors: is damaged or no safetensors file (OSError: is not a plain file)"),
    "a weight less": (_without_tensor, "lacks the weights model.layers.1.mlp.gate.weight"),
    "integers": (_quantised, "has the type I8; allowed: F64, F32, F16, BF16, no quantised weights"),
    "another vocabulary": (_other_vocabulary, "has the shape (320, 32), and config.json gives (330, 32)"),
    "a larger tokenizer": (_large_tokenizer, "tokenizer.json: its largest id is 290, and the model has vocab_size 288"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer.json; it has tokenizer.model, which AutoTokenizer"),
    "damaged tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json: cannot be read ("),
    "an adapter": (_adapter, "has adapter_config.json: an adapter, not a whole model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_probed_is_one_line(folder: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    spoil(folder)
    assert message in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "olmoe")
    save_model(model, tmp_path / "shards", max_shard_size="60KB")
    write_tokenizer(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*"))
    shards[1].unlink()
    shards[2].unlink()
    message = refusal(tmp_path / "shards")
    assert f"{shards[1].name} and 1 more of {len(shards)} shards missing, which model.safetensors.index.json" in message


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ("{}", "index.json: cannot be read"),
        ('{"weight_map": {"x": "../other.safetensors"}}', "weight_map has names that are no files of the folder"),
        ('{"weight_map": {"x": 3}}', "weight_map has names that are no files of the folder"),
        ('{"weight_map": {"x": "config.json"}}', "lists config.json; allowed: files that end in .safetensors"),
        ('{"weight_map": {"x": "model.safetensors"}}', "model.safetensors: lacks the tensor x"),
    ],
)
def test_an_index_names_only_files_of_its_folder(folder: Path, weight_map: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(weight_map)
    assert message in refusal(folder)


def test_keys_that_name_code_or_files_are_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network and without an import: the model is the one of transformers, with its own weights."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    change_config(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        transformers_weights="pytorch_model.bin",
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
        experts_implementation="someone/else",
        fusion_config={"patch_embeddings": True},
    )
    (folder / "generation_config.json").write_text("{")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    model = load_model(open_pretrained(name(folder)))
    assert type(model.module).__module__ == "transformers.models.mixtral.modeling_mixtral"
    assert model.module.config._attn_implementation == "sdpa"
    assert not hasattr(model.module.config, "auto_map")


def test_weights_that_the_architecture_lacks_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.9.extra.weight": torch.ones(2)}, folder / "model.safetensors")
    assert load_model(open_pretrained(name(folder))).unused == ("model.layers.9.extra.weight",)


def test_memory_is_known_before_a_weight_is_loaded(folder: Path) -> None:
    opened = open_pretrained(name(folder))
    with pytest.raises(
        UsageError, match=r"needs about 4[\d.]+ TiB for 1,000,000,000,000 parameters .*--dtype bfloat16"
    ):
        require_memory(opened, 10**12, torch.float32)
    require_memory(opened, opened.num_parameters, torch.float32)


def test_special_tokens_around_a_text_are_those_of_the_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {"id": "<|endoftext|>", "type_id": 0}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(open_pretrained(name(folder)))
    assert (tokenizer.prefix, tokenizer.suffix) == ((0,), ())
    token_N = tokenizer.encode("The mill <|endoftext|>")  # written in a text, it is text
    assert b"".join(tokenizer.pieces[token] for token in token_N.tolist()) == b"The mill <|endoftext|>"
