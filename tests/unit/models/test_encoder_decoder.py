"""The encoder-decoder model: what each half may see, padding, cost, pairing, and where experts are allowed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import randomise_parameters
from support.training_cases import Run, tiny_config, write_text
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebench.compatibility import check_cell, list_marks
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.models.attention import AttentionStyle, CrossAttention, EncoderOutput
from moebench.schema import CellConfig
from moebench.tasks.task import Batch
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_initialised_model, compute_model_cost, prepare_task
from moebench.training.objective import add_token_loss, compute_objective

SPANS = {"name": "span_corruption", "sequence_length": 20, "eval_windows": 2, "noise_density": 0.3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def config_of(text: Path, router: str = "top_k", **sections: object) -> CellConfig:
    return tiny_config(text, task=SPANS, router=router, **sections)


def model_of(config: CellConfig, folder: Path) -> tuple[Model, Batch]:
    task = prepare_task(config, folder)
    return build_initialised_model(config, task), task.train_batch(3, 0, 0)


def out_of(model: Model, batch: Batch, *, training: bool = False) -> Tensor:
    return model(batch, batch_context(batch, training=training, seed=0))[0]


def changed_from(value_BL: Tensor, place: int) -> Tensor:
    other_BL = value_BL.clone()
    other_BL[:, place:] = (other_BL[:, place:] + 1) % 200
    return other_BL


@pytest.mark.parametrize("router", ["dense", "top_k", "hash"])
def test_the_decoder_sees_its_past_and_all_of_the_encoder(text: Path, tmp_path: Path, router: str) -> None:
    model, batch = model_of(config_of(text, router), tmp_path)
    randomise_parameters(model)
    assert batch.decoder_input_BP is not None
    before = out_of(model, batch)
    after = out_of(model, replace(batch, decoder_input_BP=changed_from(batch.decoder_input_BP, 4)))
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4] != before[:, 4]).any(-1).all()
    encoded = out_of(model, replace(batch, input_BL=changed_from(batch.input_BL, batch.input_BL.shape[1] - 1)))
    assert (encoded != before).any(-1).all()  # the encoder's last token reaches the decoder's first


def test_the_probe_finds_a_leak_where_there_is_one(text: Path, tmp_path: Path) -> None:
    model, batch = model_of(config_of(text, "expert_choice", allow_noncausal=True), tmp_path)
    randomise_parameters(model)
    assert batch.decoder_input_BP is not None
    leaked = False
    for seed in range(5):
        randomise_parameters(model, seed)
        after = out_of(model, replace(batch, decoder_input_BP=changed_from(batch.decoder_input_BP, 4)))
        leaked |= not torch.allclose(after[:, :4], out_of(model, batch)[:, :4])
    assert leaked


@pytest.mark.parametrize("router", ["dense", "top_k", "expert_choice", "soft_moe"])
def test_padding_on_both_sides_changes_nothing(text: Path, tmp_path: Path, router: str) -> None:
    model, batch = model_of(config_of(text, router, allow_noncausal=True), tmp_path)
    randomise_parameters(model)
    assert batch.decoder_input_BP is not None

    def longer(value_BL: Tensor, by: int) -> Tensor:
        return torch.cat([value_BL, value_BL[:, :1].expand(-1, by) * 0 + 7], dim=1)

    def valid(value_BL: Tensor, by: int) -> Tensor:
        return torch.arange(value_BL.shape[1] + by).expand(len(value_BL), -1) < value_BL.shape[1]

    padded = replace(
        batch,
        input_BL=longer(batch.input_BL, 5),
        valid_BL=valid(batch.input_BL, 5),
        decoder_input_BP=longer(batch.decoder_input_BP, 3),
        decoder_valid_BP=valid(batch.decoder_input_BP, 3),
    )
    length = batch.target_BP.shape[1]
    unpadded = out_of(model, batch)
    torch.testing.assert_close(out_of(model, padded)[:, :length], unpadded, rtol=1e-4, atol=1e-4)
    unmasked = replace(padded, valid_BL=None)
    assert not torch.allclose(out_of(model, unmasked)[:, :length], unpadded, rtol=1e-4, atol=1e-4)


def test_cross_attention_equals_a_loop() -> None:
    cross = randomise_parameters(CrossAttention(AttentionStyle.of(resolve({"model": {"d_model": 8}}).model, 1.0)))
    generator = torch.Generator().manual_seed(0)
    x_BLD, x_BMD = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    valid_BM = torch.tensor([[True] * 5, [True, True, False, False, True]])
    ours = cross(x_BLD, EncoderOutput(x_BMD=x_BMD, valid_BM=valid_BM))
    key_BMD, value_BMD = cross.key_value(x_BMD).chunk(2, dim=-1)
    for sequence in range(2):
        for place in range(3):
            read = []
            for head in (slice(0, 4), slice(4, 8)):
                query = cross.query(x_BLD[sequence, place])[head]
                seen = valid_BM[sequence].nonzero().squeeze(-1)
                weights = (key_BMD[sequence, seen, head] @ query / 2).softmax(0)
                read.append(weights @ value_BMD[sequence, seen, head])
            torch.testing.assert_close(ours[sequence, place], cross.out(torch.cat(read)))


@pytest.mark.parametrize("router", ["dense", "top_k", "switch"])
def test_flops_are_those_of_a_real_forward(text: Path, tmp_path: Path, router: str) -> None:
    config = config_of(text, router)
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task).double()
    batch = task.train_batch(4, 0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, batch_context(batch, training=True, seed=0))
    counted = counter.get_total_flops() / (4 * task.tokens_per_sequence)
    assert compute_model_cost(model, task.sequence_length, task.decoder_length).flops_per_token == round(counted)


@pytest.mark.parametrize("where", ["both", "encoder", "decoder"])
def test_experts_are_where_the_layout_says(text: Path, tmp_path: Path, where: str) -> None:
    layout = {"num_experts": 4, "experts_in": where, "expert_width": None, "n": 1}
    model, batch = model_of(config_of(text, "switch", layout=layout, model={"ffn_width": 64}), tmp_path)
    _, records = model(batch, batch_context(batch, training=True, seed=0))
    halves = ("encoder", "decoder") if where == "both" else (where,)
    names = [f"{half}.{block}" for half in halves for block in range(2)]
    assert [str(record.layer) for record in records] == names
    assert [str(layer.name) for layer in model.backbone.moe_layers()] == names
    lengths = {"encoder": batch.input_BL.shape[1], "decoder": batch.target_BP.shape[1]}
    assert [record.routing.num_tokens for record in records] == [3 * lengths[name.split(".")[0]] for name in names]
    dense, _ = model_of(config_of(text, "dense", layout=layout, model={"ffn_width": 64}), tmp_path)
    ours, theirs = (
        compute_model_cost(m, lengths["encoder"], lengths["decoder"]).flops_per_token for m in (model, dense)
    )
    assert ours == pytest.approx(theirs, rel=0.02)


def test_arms_share_the_weights_of_what_they_share(text: Path, tmp_path: Path) -> None:
    states = {name: model_of(config_of(text, name), tmp_path)[0].state_dict() for name in ("dense", "switch", "hash")}
    for other in ("switch", "hash"):
        shared = states["dense"].keys() & states[other].keys()
        assert {name for name in states["dense"] if name not in shared} == {
            f"backbone.{half}.blocks.{block}.feed_forward.{weight}"
            for half in ("encoder", "decoder")
            for block in (0, 1)
            for weight in ("w_in_DF", "w_out_FD")
        }
        assert all(torch.equal(states["dense"][name], states[other][name]) for name in shared)
    assert "backbone.decoder.blocks.1.cross_attention.key_value.weight" in states["dense"]


def test_a_random_table_differs_between_the_halves(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, task=SPANS, router={"name": "hash", "table": "random"})
    model, _ = model_of(config, tmp_path)
    tables = [layer.router.table_V for layer in model.backbone.moe_layers()]
    assert len({tuple(table.tolist()) for table in tables}) == 4


@pytest.mark.parametrize(("where", "allowed"), [("both", False), ("decoder", False), ("encoder", True)])
def test_routers_that_see_the_future_are_for_the_encoder(where: str, allowed: bool) -> None:
    raw = {"task": "span_corruption", "router": "expert_choice", "layout": {"experts_in": where}}
    assert list_marks(resolve(raw)) == (() if allowed else ("non-causal",))
    if allowed:
        check_cell(resolve(raw))
        return
    with pytest.raises(UsageError, match=r"is not causal: .* layout\.experts_in=encoder, or allow_noncausal=true"):
        check_cell(resolve(raw))
    check_cell(resolve(raw | {"allow_noncausal": True}))


def test_halves_are_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match=r"^layout\.experts_in: 'decoder' .* task 'language' .*\(allowed: both\)"):
        check_cell(resolve({"layout": {"experts_in": "decoder"}}))
    with pytest.raises(UsageError, match=r"^layout\.name: .* 'whole_model' are whole models, which do not read an"):
        check_cell(resolve({"task": "span_corruption", "layout": "whole_model"}))


@pytest.mark.parametrize("layout", ["moduleformer", "attention", "fine_grained"])
def test_other_layouts_build_and_run(text: Path, tmp_path: Path, layout: str) -> None:
    config = config_of(text, layout={"name": layout, "num_experts": 4, "match": "none"})
    model, batch = model_of(config, tmp_path)
    out_of(model, batch, training=True).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_reinforcement_in_the_encoder_gets_the_loss_of_the_sequence(text: Path, tmp_path: Path) -> None:
    seen: dict[str, Tensor] = {}
    config = tiny_config(text, task=SPANS | {"sequence_length": 21, "noise_density": 0.48, "mean_span": 10.0})
    model, batch = model_of(config, tmp_path)
    assert batch.input_BL.shape == batch.target_BP.shape  # so only the layer's name distinguishes the halves
    output, records = model(batch, batch_context(batch, training=True, seed=0))
    loss_BP = prepare_task(config, tmp_path).loss(output, batch)
    layers = model.backbone.moe_layers()
    for layer in layers:

        def record_loss(record, name=str(layer.name)):
            seen[name] = record.token_loss_T

        layer.router.objective = record_loss
    compute_objective(loss_BP, batch, layers, add_token_loss(records, loss_BP, batch), {})
    mean_BP = loss_BP.mean(1, keepdim=True).expand_as(loss_BP)
    torch.testing.assert_close(seen["encoder.1"], mean_BP.reshape(-1))
    torch.testing.assert_close(seen["decoder.1"], loss_BP.reshape(-1))


@pytest.mark.parametrize(
    ("router", "where"),
    [pytest.param("dense", "both", marks=pytest.mark.slow), ("switch", "both"), ("expert_choice", "encoder")],
)
def test_it_trains(text: Path, tmp_path: Path, router: str, where: str) -> None:
    layout = {"num_experts": 4, "expert_width": 8, "experts_in": where, "n": 1}
    train = {"steps": 60, "learning_rate": 1e-2, "eval_every": 100, "log_every": 60}
    config = config_of(text, router, layout=layout, train=train)
    check_cell(config)
    run = Run(config, tmp_path)
    result = run()
    assert result is not None
    assert result.marks == ()
    assert result.cost["train_tokens"] == 60 * 4 * (16 + 9)  # 6 of 20 tokens in 2 spans: 16 are read, 9 are predicted
    assert result.metrics["span_bits_per_byte"] < 9  # at the start 9 · log2(261) / 6 = 12.04
    if router != "dense":
        halves = ("encoder", "decoder") if where == "both" else (where,)
        assert [list(layers) for _, layers in run.loads] == [[f"{h}.{b}" for h in halves for b in (0, 1)]]
