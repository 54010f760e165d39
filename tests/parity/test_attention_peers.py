"""Our attention computes what that of published models in transformers does, and positions are scaled as theirs are."""

import importlib
from typing import Any

import pytest
import torch
from support.cases import randomise_parameters
from torch import Tensor

from moebench.models.attention import Attention, AttentionStyle
from moebench.models.positions import Rotary
from moebench.schema import ModelConfig

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LENGTH, WIDTH = 24, 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
OURS_LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 16}


def build_peer(model: str, rope: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """Return the attention, the rotary positions and the configuration of a model of transformers."""
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    [config_class] = [getattr(configuration, name) for name in dir(configuration) if name.lower() == f"{model}config"]
    prefix = config_class.__name__.removesuffix("Config")
    config = config_class(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=256,
        vocab_size=8,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rope,
        attn_implementation="eager",
        rms_norm_eps=1e-5,
        **options,
    )
    return (
        getattr(modeling, f"{prefix}Attention")(config, layer_idx=0),
        getattr(modeling, f"{prefix}RotaryEmbedding")(config),
        config,
    )


def copy_weights(ours: Attention, peer: Any) -> None:
    """Give the peer our weights: it has one projection for queries, one for keys, one for values."""
    rows = [ours.style.d_model, ours.style.kv_width, ours.style.kv_width]
    with torch.no_grad():
        for name, weight in zip("qkv", ours.qkv.weight.split(rows), strict=True):
            getattr(peer, f"{name}_proj").weight.copy_(weight)
        peer.o_proj.weight.copy_(ours.out.weight)
        if ours.qkv.bias is not None:
            for name, bias in zip("qkv", ours.qkv.bias.split(rows), strict=True):
                getattr(peer, f"{name}_proj").bias.copy_(bias)
        if ours.qk_norm is not None:
            peer.q_norm.weight.copy_(ours.qk_norm.query.weight)
            peer.k_norm.weight.copy_(ours.qk_norm.key.weight)


def run_peer(peer: Any, rotary: Any, x_BLD: Tensor) -> Tensor:
    """Run the causal attention of transformers."""
    position_1L = torch.arange(LENGTH)[None]
    future_LL = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    y_BLD, _ = peer(x_BLD, position_embeddings=rotary(x_BLD, position_1L), attention_mask=future_LL[None, None])
    return y_BLD


@pytest.mark.parametrize(
    ("model", "ours", "rope"),
    [
        pytest.param("llama", {}, {}, id="llama with grouped queries"),
        pytest.param("llama", OURS_LLAMA3, LLAMA3, id="llama 3.1"),
        pytest.param(
            "llama",
            {"rope_scaling": "linear", "rope_factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
            id="linear scaling",
        ),
        pytest.param("qwen2", {"attention_bias": "qkv"}, {}, id="qwen 2: biases of queries, keys and values"),
        pytest.param("qwen3", {"qk_norm": "head"}, {}, id="qwen 3: norm of each head"),
        pytest.param("olmo2", {"qk_norm": "full"}, {}, id="olmo 2: norm of all heads"),
    ],
)
def test_attention_is_that_of_a_published_model(model: str, ours: dict[str, Any], rope: dict[str, Any]) -> None:
    config = ModelConfig(d_model=WIDTH, num_heads=4, num_kv_heads=2, norm_eps=1e-5, **ours)
    attention = randomise_parameters(Attention(AttentionStyle.of(config, 1.0), causal=True))
    peer, rotary, _ = build_peer(model, rope)
    copy_weights(attention, peer)
    x_BLD = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(x_BLD), run_peer(peer.eval(), rotary, x_BLD), rtol=1e-4, atol=1e-4)


def test_ntk_scaling_is_that_of_the_dynamic_one_at_the_same_factor() -> None:
    # "dynamic" takes its factor from the length: factor · length / original - (factor - 1), which is 4 at 42 of 24.
    factor, length = 4.0, 42
    _, rotary, _ = build_peer("llama", {})
    functions = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    _, _, config = build_peer("llama", {"rope_type": "dynamic", "factor": factor})
    config.max_position_embeddings = 24
    frequency, _ = functions["dynamic"](config, torch.device("cpu"), seq_len=length)
    ours = Rotary(scaling="ntk", factor=factor).frequencies(8, torch.device("cpu"))
    torch.testing.assert_close(ours, frequency)
    assert ours[-1].item() == pytest.approx(rotary.inv_freq[-1].item() / factor)  # the slowest is divided, ...
    assert ours[0] == rotary.inv_freq[0]  # ... the fastest kept
