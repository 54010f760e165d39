"""A window of several documents, masked, gives what each document gives alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import randomise_parameters
from support.layout_models import backbone_of, batch, config_of
from support.training_cases import Run, tiny_config, write_text

from moebench.model_config import ModelConfig
from moebench.models.attention import Attention, AttentionStyle
from moebench.models.dropout import SequenceDropout
from moebench.models.positions import PositionTable
from moebench.training.model import prepare_task

LENGTHS = (1, 5, 7, 3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("layout", "router", "model"),
    [
        ("every_n", "dense", {}),
        ("every_n", "top_k", {}),
        ("every_n", "top_k", {"num_kv_heads": 1, "qk_norm": "head", "attention_bias": "all"}),
        ("attention", "top_k", {}),
        ("moduleformer", "top_k", {}),
    ],
)
def test_documents_of_a_window_do_not_read_each_other(causal, layout, router, model):
    backbone = backbone_of(config_of(layout, router, model), causal=causal)
    x_BLD, ctx = batch(training=False, size=1)
    document_BL = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).unsqueeze(0)
    y_BLD, _ = backbone(x_BLD, replace(ctx, document_BL=document_BL))
    alone = []
    for part_BLD, ids_BL in zip(x_BLD.split(LENGTHS, 1), ctx.token_id_BL.split(LENGTHS, 1), strict=True):
        part_ctx = replace(ctx, token_id_BL=ids_BL, features={})
        alone.append(backbone(part_BLD, part_ctx)[0])
    torch.testing.assert_close(y_BLD, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)
    unmasked_BLD, _ = backbone(x_BLD, ctx)
    assert not torch.allclose(unmasked_BLD, y_BLD, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_weights_are_dropped_inside_documents(causal, rate):
    style = AttentionStyle.of(ModelConfig(d_model=16, num_heads=4, num_kv_heads=2), 1.0)
    attention = randomise_parameters(Attention(style, causal=causal))
    dropout = SequenceDropout(rate=rate, purpose=("test",))
    document_BL = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    positions = PositionTable.of_documents(document_BL)
    x_BLD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y_BLD = attention(x_BLD, positions, dropout)
    if not rate:
        torch.testing.assert_close(y_BLD, attention(x_BLD, positions))
    for sequence in range(2):
        for query in range(6):
            (gradient_BLD,) = torch.autograd.grad(y_BLD[sequence, query].sum(), x_BLD, retain_graph=True)
            is_read_L = gradient_BLD[sequence].abs().amax(-1) > 0
            may_read_L = document_BL[sequence] == document_BL[sequence, query]
            if causal:
                may_read_L &= torch.arange(6) <= query
            assert not (is_read_L & ~may_read_L).any()
            if not rate:
                assert torch.equal(is_read_L, may_read_L)


@pytest.mark.parametrize("name", ["language", "masked_language"])
def test_documents_begin_with_separators(tmp_path: Path, name: str):
    text = write_text(tmp_path)
    data = {"path": str(text), "mask_documents": True}
    task = prepare_task(tiny_config(text, task={"name": name, "sequence_length": 64, "data": data}), tmp_path)
    plain_data = {"path": str(text)}
    plain = prepare_task(tiny_config(text, task={"name": name, "sequence_length": 64, "data": plain_data}), tmp_path)
    batches = [task.train_batch(8, 0, step) for step in range(20)]
    token_BL = torch.cat([batch.target_BP if name == "masked_language" else batch.input_BL for batch in batches])
    document_BL = torch.cat([batch.document_BL for batch in batches])
    # Slow oracle: count the separators (256) up to each token.
    for tokens, documents in zip(token_BL.tolist(), document_BL.tolist(), strict=True):
        assert documents == [tokens[: end + 1].count(256) for end in range(len(tokens))]
    assert (token_BL == 256).any()
    assert plain.train_batch(8, 0, 0).document_BL is None
    assert plain.digest == task.digest
    assert plain.eval_digest != task.eval_digest


def test_a_masked_model_is_trained_and_evaluated_masked(tmp_path: Path):
    text, quality = write_text(tmp_path), []
    for is_masked in (True, False):
        data = {"path": str(text), "mask_documents": is_masked}
        task = {"name": "language", "sequence_length": 90, "data": data}
        (tmp_path / f"{is_masked}").mkdir()
        result = Run(tiny_config(text, task=task), tmp_path / f"{is_masked}")()
        assert result is not None
        quality.append(result.metrics["bits_per_byte"])
    assert quality[0] != quality[1]
