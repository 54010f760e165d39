"""Options of the transformer hold in every layout, in both halves of an encoder-decoder model, and in its cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import randomise_parameters
from support.layout_models import D_MODEL, backbone_of, batch, config_of
from support.model_options import ALL_OPTIONS, WITHOUT_DRAWS
from support.training_cases import tiny_config, write_text
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebench.experts.biased import BiasedExpertBank
from moebench.experts.feed_forward import FeedForward
from moebench.experts.layout import LAYOUTS
from moebench.models.attention import Attention
from moebench.models.memory import ModelSize
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_initialised_model, compute_model_cost, prepare_task

SPANS = {"name": "span_corruption", "sequence_length": 20, "eval_windows": 2, "noise_density": 0.3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def model_of(text: Path, folder: Path, **sections: Any) -> tuple[Model, Any]:
    config = tiny_config(text, **sections)
    task = prepare_task(config, folder)
    return build_initialised_model(config, task), task


@pytest.mark.parametrize("layout", LAYOUTS.names())
def test_every_layout_trains_all_its_parameters_and_stays_causal(layout: str) -> None:
    options = {"match": "none"} | ({"num_experts": 12} if layout == "heterogeneous" else {})
    config = config_of(layout, model=ALL_OPTIONS, **options)
    backbone = randomise_parameters(backbone_of(config))
    assert not [module for module in backbone.modules() if isinstance(module, nn.RMSNorm)]
    assert all(module.eps == 1e-4 for module in backbone.modules() if isinstance(module, nn.LayerNorm))
    x_BLD, ctx = batch(training=True)
    y_BLD, records = backbone(x_BLD, ctx)
    y_BLD.square().sum().backward()
    assert records
    without = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert not without
    assert not [name for name, p in backbone.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    other_BLD = x_BLD.clone()
    other_BLD[:, 9:] += 1
    torch.testing.assert_close(backbone(other_BLD, ctx)[0][:, :9], y_BLD[:, :9])  # the same draws, and no future


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("router", "layout"),
    [
        ("dense", "every_n"),
        ("switch", "every_n"),
        ("top_k", "attention"),
        ("top_k", "moduleformer"),
        ("top_k", "fine_grained"),
        ("lory", "every_n"),
    ],
)
def test_flops_and_parameters_are_those_of_a_real_forward(
    text: Path, tmp_path: Path, router: str, layout: str, activation: str
) -> None:
    options = ALL_OPTIONS | {"activation": activation, "tie_embeddings": True}
    sections = {"router": router, "layout": {"name": layout, "match": "none"}, "task": {"eval_windows": 2}}
    model, task = model_of(text, tmp_path, model=options, **sections)
    model = model.double()  # in fp64 every expert is a plain product, which is counted
    train_batch = task.train_batch(4, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(train_batch, batch_context(train_batch, training=True, seed=0))
    counted = counter.get_total_flops()
    if router == "lory":  # the sums of biases are not counted: E per bias for each of 4 segments of 4 sequences
        biases = [p for name, p in model.named_parameters() if ".bank.b_" in name]
        counted -= sum(2 * p.numel() * 16 for p in biases)
    cost = compute_model_cost(model, 8)
    assert cost.flops_per_token == counted / (4 * 8)
    assert cost.total_params == sum(p.numel() for p in model.parameters())


def test_flops_of_an_encoder_decoder_are_those_of_a_real_forward(text: Path, tmp_path: Path) -> None:
    model, task = model_of(text, tmp_path, model=ALL_OPTIONS | {"tie_embeddings": True}, task=SPANS, router="top_k")
    model = model.double()
    train_batch = task.train_batch(3, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(train_batch, batch_context(train_batch, training=True, seed=0))
    lengths = task.sequence_length, task.decoder_length
    planned = compute_model_cost(model, *lengths).flops_per_token
    assert planned == round(counter.get_total_flops() / (3 * sum(lengths)))


def test_parameters_by_hand(text: Path, tmp_path: Path) -> None:
    # D = 8, two heads of 4, one of keys and values; 2 blocks of experts of width 8; a table of 257 ids, used twice.
    options = {"num_kv_heads": 1, "attention_bias": "all", "ffn_bias": True, "norm": "layernorm", "qk_norm": "head"}
    sections = {"model": options | {"tie_embeddings": True}, "router": "switch"}
    model, _ = model_of(text, tmp_path, **sections)
    attention = (8 + 2 * 4) * (8 + 1) + 8 * (8 + 1) + 2 * 2 * 4
    experts = 4 * (8 * (8 + 1) + 8 * (8 + 1)) + 4 * 8
    assert compute_model_cost(model, 8).total_params == 257 * 8 + 2 * (attention + experts + 2 * 16) + 16


def test_networks_and_norms_of_all_places_have_the_options(text: Path, tmp_path: Path) -> None:
    model, _ = model_of(
        text, tmp_path, model=WITHOUT_DRAWS, task=SPANS, router="top_k", layout={"experts_in": "decoder"}
    )
    banks = [layer.bank for layer in model.backbone.moe_layers()]
    assert len(banks) == 2
    assert all(isinstance(bank, BiasedExpertBank) for bank in banks)
    dense = [module for module in model.modules() if isinstance(module, FeedForward)]
    assert len(dense) == 2
    assert all(network.b_in_F is not None for network in dense)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert {attention.qkv.out_features for attention in attentions} == {8 + 2 * 4}
    scaled = {attention.style.rotary.scaling for attention in attentions}
    assert scaled == {"llama3"}


def test_shared_experts_and_deep_experts_have_biases() -> None:
    residual = backbone_of(config_of("residual", "switch", model={"ffn_bias": True}, match="none"))
    assert all(layer.shared.b_out_D is not None for layer in residual.moe_layers())
    deep = backbone_of(config_of("every_n", model={"ffn_bias": True}, match="none", depth=2))
    assert all(isinstance(bank, BiasedExpertBank) for layer in deep.moe_layers() for bank in layer.bank.banks)


def test_the_residual_stream_is_scaled_by_hand() -> None:
    config = config_of("every_n", "dense", model={"num_layers": 1, "residual_scale": 0.25})
    backbone = randomise_parameters(backbone_of(config))
    [block] = backbone.blocks
    x_BLD, ctx = batch(training=True)
    middle_BLD = x_BLD + 0.25 * block.attention(block.attention_norm(x_BLD))
    added_TD = block.feed_forward(block.feed_forward_norm(middle_BLD).flatten(0, 1))
    expected = backbone.norm(middle_BLD + 0.25 * added_TD.view_as(x_BLD))
    torch.testing.assert_close(backbone(x_BLD, ctx)[0], expected)


def test_embedded_inputs_are_scaled(text: Path, tmp_path: Path) -> None:
    for options, scale in (
        ({"embedding_scale": 3.0}, 3.0),
        ({"tie_embeddings": True}, 8**0.5),
        ({"tie_embeddings": True, "embedding_scale": 1.0}, 1.0),
    ):
        model, task = model_of(text, tmp_path, model=options, router="dense")
        input_BL = task.train_batch(2, 0, 0).input_BL
        torch.testing.assert_close(model.embed(input_BL), scale * model.embedding(input_BL))


def test_memory_counts_what_dropout_of_attention_and_a_tied_output_keep(text: Path, tmp_path: Path) -> None:
    def size_of(**options: Any) -> ModelSize:
        model, task = model_of(text, tmp_path, model=options, router="dense")
        return ModelSize.of(model, model.backbone, task.tokens_per_sequence)

    plain = size_of()
    dropped = size_of(attention_dropout=0.1)
    assert dropped.values_per_token - plain.values_per_token == 2 * 2 * 2 * 8  # blocks, copies, heads, positions
    tied = size_of(tie_embeddings=True)
    assert tied.values_per_token == plain.values_per_token
    assert plain.replicated_params - tied.replicated_params == 257 * 8


def test_expert_width_is_matched_with_biases() -> None:
    for match in ("flops", "params"):
        options = WITHOUT_DRAWS | {"num_layers": 1}
        backbone = backbone_of(config_of("every_n", model=options, match=match, n=1))
        dense = backbone_of(config_of("every_n", "dense", model=options))
        cost, target = (
            sum(p.numel() for p in each.parameters()) if match == "params" else each.blocks[0].flops_per_token(D_MODEL)
            for each in (backbone, dense)
        )
        assert cost == pytest.approx(target, rel=0.02)
