"""Training with options of the transformer: resuming, tied weights in checkpoints, the z-loss, weight decay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_options import ALL_OPTIONS, DROPOUT
from support.task_data import write_data
from support.training_cases import Run, assert_same_runs, tiny_config, write_text

from moebench.models.tied_head import TiedHead
from moebench.tasks.task import Batch
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.objective import LossNormalizer, Objective
from moebench.training.z_loss import add_z_loss

SPANS = {"name": "span_corruption", "sequence_length": 20, "eval_windows": 2, "noise_density": 0.3}
MASKED = {"name": "masked_language", "sequence_length": 8, "eval_windows": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"router": "top_k"}, marks=pytest.mark.slow),
        pytest.param({"router": "top_p", "layout": {"name": "moduleformer", "match": "none"}}, marks=pytest.mark.slow),
        {"task": SPANS, "router": "switch", "train": {"accumulate": 2, "precision": "bf16"}},
    ],
    ids=["experts", "heads", "encoder-decoder in bf16"],
)
def test_resuming_with_dropout_repeats_the_run(text: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    train = {"z_loss": 0.01} | sections.get("train", {})
    model = ALL_OPTIONS | {"tie_embeddings": True}
    config = tiny_config(text, **(sections | {"model": model, "train": train}))
    complete, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    complete()
    parts(stop_at=5)
    parts()
    assert_same_runs(complete, parts)


@pytest.mark.parametrize("task", [pytest.param("vision", marks=pytest.mark.slow), "speech"])
def test_other_inputs_resume_with_dropout_too(tmp_path: Path, task: str) -> None:
    data = write_data(tmp_path)
    config = tiny_config(
        tmp_path, task={"name": task, **data[task]}, router="smear", model=ALL_OPTIONS, train={"z_loss": 0.01}
    )
    complete, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    complete()
    parts(stop_at=5)
    parts()
    assert_same_runs(complete, parts)


@pytest.mark.parametrize("task", [{}, MASKED, SPANS], ids=["language", "masked", "spans"])
def test_tied_weights_stay_tied_and_are_stored_once(text: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    config = tiny_config(text, task=task, model={"tie_embeddings": True}, router="dense")
    run = Run(config, tmp_path)
    run(stop_at=5)
    run()
    stored = run.checkpoint(12)
    assert [name for name in stored["state_dict"] if "head" in name] == []
    prepared = prepare_task(config, tmp_path)
    model = build_initialised_model(config, prepared)
    fresh = model.embedding.weight.detach().clone()
    model.load_state_dict({name.removeprefix("model."): value for name, value in stored["state_dict"].items()})
    assert not torch.equal(model.embedding.weight, fresh)
    x_BLD = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    num_outputs = model.head.num_outputs
    assert num_outputs == prepared.build_head(8).out_features  # a mask is an input alone
    torch.testing.assert_close(model.head(x_BLD), x_BLD @ model.embedding.weight[:num_outputs].T)
    assert isinstance(model.head, TiedHead)


def test_tied_logits_start_with_unit_variance(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, model={"tie_embeddings": True, "d_model": 64}, router="dense")
    model = build_initialised_model(config, prepare_task(config, tmp_path))
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert model.embed(torch.arange(200)[None]).std().item() == pytest.approx(1.0, rel=0.03)
    x_BLD = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    assert model.head(x_BLD).std().item() == pytest.approx(1.0, rel=0.05)


def test_no_option_at_its_default_changes_a_run(text: Path, tmp_path: Path) -> None:
    spelled = dict.fromkeys(DROPOUT, 0.0) | {"num_kv_heads": 2, "embedding_scale": 1.0, "residual_scale": 1.0}
    plain = Run(tiny_config(text, router="top_k"), tmp_path / "plain")
    same = Run(tiny_config(text, router="top_k", model=spelled), tmp_path / "same")
    plain()
    same()
    assert_same_runs(plain, same)


def objective_of(task: float) -> Objective:
    value = torch.tensor(task)
    return Objective(total=value, task=value, raw={}, weighted={})


def test_z_loss_by_hand() -> None:
    # log Z of (0, 0) is log 2, of (log 3, 0) log 4; the third prediction does not count.
    logits_BPV = torch.tensor([[[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]]])
    logits_BPV[0, 1] = torch.tensor([3.0, 1.0]).log()
    logits_BPV[0, 2] = 100.0
    ones_BP = torch.ones(1, 3, dtype=torch.int64)
    batch = Batch(
        input_BL=ones_BP,
        target_BP=ones_BP,
        weight_BP=ones_BP,
        domain_B=ones_BP[:, 0],
        count_BP=torch.tensor([[1, 1, 0]]),
    )
    normalizer = LossNormalizer.of_single_batch(batch)
    with_z = add_z_loss(objective_of(1.5), 0.1, [logits_BPV, logits_BPV], batch, normalizer)
    expected = (torch.tensor(2.0).log() ** 2 + torch.tensor(4.0).log() ** 2).item() / 2
    assert with_z.raw["output_z"].item() == pytest.approx(expected)
    assert with_z.total.item() == pytest.approx(1.5 + 0.1 * expected)
    assert with_z.task.item() == 1.5
    assert set(with_z.parts()) == {"loss/task", "loss/total", "loss/output_z", "balance/output_z"}
    plain = objective_of(1.5)
    assert add_z_loss(plain, 0.0, [logits_BPV], batch, normalizer) is plain


@pytest.mark.parametrize(
    "task",
    [
        "language",
        pytest.param("masked_language", marks=pytest.mark.slow),
        pytest.param("span_corruption", marks=pytest.mark.slow),
    ],
)
def test_z_loss_is_recorded_and_lowers_z(text: Path, tmp_path: Path, task: str) -> None:
    last = {}
    for coefficient in (1e-9, 1.0):
        run = Run(
            tiny_config(text, task={"name": task}, router="switch", train={"z_loss": coefficient}),
            tmp_path / f"{coefficient}",
        )
        run()
        points = [metrics["balance/output_z"] for _, metrics in run.points() if "balance/output_z" in metrics]
        assert len(points) == 12
        last[coefficient] = points[-1]
    assert last[1.0] < last[1e-9]


def test_norms_and_biases_are_not_decayed(text: Path, tmp_path: Path) -> None:
    layout = {"name": "attention", "feed_forward": "experts", "match": "none"}
    config = tiny_config(text, model=ALL_OPTIONS, router="top_k", layout=layout)
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    optimizer: Any = module.configure_optimizers()
    names = {id(p): name for name, p in module.model.named_parameters()}
    decayed = {
        names[id(p)]: group["weight_decay"] for group in optimizer["optimizer"].param_groups for p in group["params"]
    }
    assert set(decayed) == set(names.values())
    last = {name: name.rpartition(".")[2] for name in decayed}
    vectors = {name for name in decayed if last[name] == "bias" or last[name].startswith("b_") or "norm" in name}
    assert {name for name, decay in decayed.items() if decay == 0} == vectors
    assert {last[name] for name in vectors} == {"bias", "weight", "b_in_EF", "b_out_ED", "b_out_EO"}


def test_an_optimizer_without_gradient_keeps_stacked_biases(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, model={"ffn_bias": True}, router="switch", train={"weight_decay": 10.0})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    bank = module.layers[0].bank
    with torch.no_grad():
        bank.b_in_EF.fill_(1.0)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer: Any = module.configure_optimizers()
    weight = bank.w_in_EDF.detach().clone()
    optimizer["optimizer"].step()
    assert torch.equal(bank.b_in_EF, torch.ones_like(bank.b_in_EF))
    assert not torch.equal(bank.w_in_EDF, weight)
