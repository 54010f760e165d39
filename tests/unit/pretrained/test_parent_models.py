"""Models of transformers as parents: the same logits in moebench, or one line that names the key of config.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pretrained_models import change_config, save_model, write_model
from support.random_models import compute_logits, draw_tokens, draw_weights
from support.training_cases import write_text

import moebench
from moebench.config import merge_settings, resolve
from moebench.errors import UsageError
from moebench.pretrained.folder import open_pretrained
from moebench.pretrained.model import load_model
from moebench.pretrained.parent import ParentModel, read_parent
from moebench.training.model import Model, build_model, prepare_task

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "arcee": ("arcee", {"mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "mixtral": ("mixtral", {"num_experts_per_tok": 3}),
    "olmoe": ("olmoe", {"num_experts_per_tok": 1}),
    "olmoe, normalised": ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
    "qwen2_moe, shared expert": ("qwen2_moe", {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe, no shared expert": ("glm4_moe", {"use_qk_norm": False, "attention_bias": True, "n_shared_experts": 0}),
}


def read(path: Path) -> ParentModel:
    return read_parent(open_pretrained(f"hf:{path}", requires_experts=False))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def build(parent: ParentModel, text: Path) -> Model:
    """Return a cell's model with the weights of a parent: all of them, with the same shapes."""
    task = {"name": "language", "sequence_length": 8, "eval_windows": 2, "data": {"path": str(text)}}
    config = resolve(merge_settings({"task": task}, parent.settings))
    model = build_model(config, prepare_task(config, text.parent))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == parent.weights.shapes
    model.load_state_dict(parent.weights)
    return model.eval()


def require_same_logits(theirs: Any, parent: ParentModel, text: Path) -> None:
    token_BL = draw_tokens(parent.vocab_size)
    with torch.no_grad():
        expected = theirs(token_BL).logits[..., : parent.vocab_size]  # the rows after those are padding
    assert expected.std() > 0.2
    torch.testing.assert_close(compute_logits(build(parent, text), token_BL), expected, rtol=0, atol=1e-5)


def draw_weights_without_gates(model: Any) -> None:
    """Draw all weights but those of the gate of a shared expert, which moebench does not have."""
    draw_weights(model)
    for name, value in model.state_dict().items():
        if name.endswith("shared_expert_gate.weight"):
            value.zero_()


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_transformers_has_the_same_logits_in_moebench(tmp_path: Path, text: Path, case: str) -> None:
    model_type, options = CASES[case]
    written = write_model(tmp_path / "model", model_type, draw_weights_without_gates, **options)
    parent = read(tmp_path / "model")
    assert parent.vocab_size == 290  # ids of the tokenizer; the embedding has 320 rows
    require_same_logits(written, parent, text)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_shards_other_names_fused_experts_and_bf16_are_read(tmp_path: Path, text: Path, model_type: str) -> None:
    written = write_model(tmp_path / "one", model_type, draw_weights)
    whole = read(tmp_path / "one")
    save_model(written, tmp_path / "shards", max_shard_size="60KB")
    save_model(written, tmp_path / "fused", save_original_format=False)
    save_model(written.to(torch.bfloat16), tmp_path / "half")
    for name in ("shards", "fused", "half"):
        (tmp_path / name / "tokenizer.json").write_bytes((tmp_path / "one" / "tokenizer.json").read_bytes())
        parent = read(tmp_path / name)
        assert parent.weights.shapes == whole.weights.shapes
        for key, value in whole.weights.items():
            expected = value.to(torch.bfloat16) if name == "half" else value
            assert torch.equal(parent.weights[key], expected), (name, key)
    assert any("gate_up_proj" in key for key in load_file(tmp_path / "fused" / "model.safetensors"))


def test_load_model_gives_a_parent_the_task_language_on_the_embedded_text() -> None:
    """The settings alone: preparing the embedded text takes long."""
    from moebench.training.parent_model import describe_cell

    parent = ParentModel(folder=None, settings={"router": "mixtral"}, weights={}, vocab_size=3)  # type: ignore[arg-type]
    assert (describe_cell(parent).task.name, describe_cell(parent).router.name) == ("language", "mixtral")


KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "latent attention": ("deepseek_v3", {}, "model_type is deepseek_v3: its attention compresses keys and values"),
    "encoder": ("switch_transformers", {}, "model_type is switch_transformers: it is an encoder and a decoder"),
    "sigmoid gate": (
        "qwen2_moe",
        {},
        "shared_expert_intermediate_size is 24: the shared expert is weighted by a sigmoid (model.layers.1.",
    ),
    "width of the shared expert": ("qwen2_moe", {"shared_expert_intermediate_size": 25}, "a multiple of moe_inter"),
    "window": ("mixtral", {"sliding_window": 16}, "sliding_window is 16; allowed in a model of moebench: None"),
    "windows": ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True; allowed in a model of moebench: F"),
    "clipping": ("olmoe", {"clip_qkv": 3.0}, "clip_qkv is 3.0; allowed in a model of moebench: None"),
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; allowed in a model of moebench: 'silu'"),
    "one expert of weight 1": ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1; allowed"),
    "too many": ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed"),
    "part of a head": (
        "glm4_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 1.0: all of a head is rotated",
    ),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "a rope_type of default, linear, llama3",
    ),
    "wide heads": ("llama", {"head_dim": 16}, "head_dim is 16; allowed in a model of moebench: hidden_size / num_a"),
}


@pytest.mark.parametrize("case", KEYS)
def test_what_moebench_does_not_compute_is_refused_by_the_key(tmp_path: Path, case: str) -> None:
    model_type, options, message = KEYS[case]
    write_model(tmp_path / "model", model_type, **options)
    with pytest.raises(UsageError) as error:
        read(tmp_path / "model")
    assert str(error.value).startswith(f"{tmp_path / 'model' / 'config.json'}: ")
    assert message in str(error.value)


def _change_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def _remove_separator(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        key.replace("<|endoftext|>", "x" * 9): n for key, n in content["model"]["vocab"].items()
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    change_config(path, vocab_size=290)
    _change_tensors(lambda tensors: tensors.update(_cut(tensors)))(path)


def _cut(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors[name][:290].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}


LARGE = {
    "model": {"d_model": 2**16, "num_layers": 40, "num_heads": 2},
    "layout": {"name": "every_n", "n": 1, "num_experts": 2**10, "expert_width": 2**16},
    "router": {"name": "switch"},
    "task": {"name": "clustered"},
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown architecture": (
        lambda path: change_config(path, model_type="llamma", architectures=None),
        "the model_type 'llamma' is unknown. Did you mean 'llama'?",
    ),
    "pickle": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "pytorch_model.bin: not read, since loading it may run code",
    ),
    "quantised": (
        lambda path: change_config(path, quantization_config={"quant_method": "gptq", "bits": 4}),
        "has quantization_config",
    ),
    "whole numbers": (
        _change_tensors(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})),
        "the tensor lm_head.weight has the type I8",
    ),
    "missing weight": (
        _change_tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks the weight model.layers.1.mlp.up_proj.weight",
    ),
    "additional weight": (
        _change_tensors(lambda tensors: tensors.update({"model.layers.1.self_attn.sinks": torch.ones(4)})),
        "has the weight model.layers.1.self_attn.sinks, which Llama has not with this config.json",
    ),
    "other width": (
        lambda path: change_config(path, intermediate_size=40),
        "the weight model.layers.0.mlp.gate_proj.weight has the shape (48, 32), and config.json gives (40, 32)",
    ),
    "other vocabulary": (
        lambda path: change_config(path, vocab_size=330),
        "the weight model.embed_tokens.weight has the shape (320, 32), and config.json gives (330, 32)",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no separator": (_remove_separator, "vocab_size is 290, and the tokenizer has 291 ids, with one for the end of a"),
    "missing shard": (
        lambda path: (path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
        ),
        "model-00001-of-00002.safetensors of 1 shards missing",
    ),
    "own format without a cell": (
        lambda path: change_config(path, model_type="moebench", architectures=None),
        "has no moebench with the sections model, layout, router",
    ),
    "own format with other names": (
        lambda path: change_config(
            path,
            model_type="moebench",
            architectures=None,
            moebench={"model": {}, "layout": {"name": "every_n"}, "router": {"name": "nope"}},
        ),
        "router.name: 'nope' is unknown",
    ),
    "own format of a size that is not there": (
        lambda path: change_config(path, model_type="moebench", architectures=None, moebench=LARGE),
        "has the shape of none, and config.json gives (",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_folder_is_one_line(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    write_model(tmp_path / "model", "llama")
    damage(tmp_path / "model")
    with pytest.raises(UsageError) as error:
        moebench.load_model(f"hf:{tmp_path / 'model'}", tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_transformers_is_not_asked_for_a_model_with_our_names(mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(mixtral, tmp_path / "model")
    change_config(tmp_path / "model", model_type="moebench", architectures=None)
    opened = open_pretrained(f"hf:{tmp_path / 'model'}", requires_experts=False)
    with pytest.raises(UsageError, match="model_type is moebench: transformers does not load it"):
        load_model(opened)
    with pytest.raises(UsageError, match="the model_type 'moebench' is unknown"):
        open_pretrained(f"hf:{tmp_path / 'model'}")


NUMBERS = ("num_local_experts", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


@pytest.mark.parametrize("value", [0, -1, 10**5, 10**8, 2**31, 2**70, True, "8", [], 1e400])
@pytest.mark.parametrize("key", [*NUMBERS, "intermediate_size", "num_experts_per_tok", "vocab_size"])
def test_numbers_that_no_model_has_are_one_line(mixtral: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(mixtral, tmp_path / "model")
    change_config(tmp_path / "model", **{key: value})
    with pytest.raises(UsageError) as error:
        read(tmp_path / "model")
    assert str(error.value).startswith(str(tmp_path / "model"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    write_model(folder, "mixtral")
    return folder
