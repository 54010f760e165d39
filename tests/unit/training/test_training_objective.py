import math
from dataclasses import replace

import pytest
import torch
from support.training_cases import Run, Watched, tiny_config, write_text

from moebench.ranks import SINGLE_RANK
from moebench.routing.layer_name import LayerName
from moebench.routing.values import LayerRecord, Routing
from moebench.tasks.task import Batch
from moebench.training.evaluation import batch_context, evaluate
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule, NonFiniteError
from moebench.training.objective import LossNormalizer, Objective, add_token_loss, average_objectives, compute_objective
from moebench.training.optimizer.schedule import compute_rate_factor


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def objective_and_gradients(text, tmp_path, losses: dict[str, float], router: str = "switch") -> tuple[Objective, dict]:
    """Return the objective of the first batch, and the gradients of the routers."""
    config = tiny_config(text, router={"name": router, "losses": losses})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    batch = task.train_batch(4, 0, 0)
    with torch.no_grad():  # the head is initialised to zero, which blocks the gradient
        module.model.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    output, records = module.model(batch, batch_context(batch, training=True, seed=0))
    result = compute_objective(task.loss(output, batch), batch, module.layers, records, losses)
    result.total.backward()
    return result, {name: p.grad for name, p in module.named_parameters() if "router" in name}


def test_every_loss_is_logged_separately(text, tmp_path) -> None:
    result, _ = objective_and_gradients(text, tmp_path, {"load_balance": 0.5, "z": 0.25})
    log = average_objectives([result], SINGLE_RANK)
    assert set(log) == {
        "loss/task", "loss/total", "loss/load_balance", "loss/z", "balance/load_balance", "balance/z",
    }  # fmt: skip
    assert log["loss/load_balance"] == pytest.approx(0.5 * log["balance/load_balance"])
    assert log["loss/z"] == pytest.approx(0.25 * log["balance/z"])
    assert log["loss/total"] == pytest.approx(log["loss/task"] + log["loss/load_balance"] + log["loss/z"])
    without, _ = objective_and_gradients(text, tmp_path, {})
    assert average_objectives([without], SINGLE_RANK) == {"loss/task": log["loss/task"], "loss/total": log["loss/task"]}


def test_coefficient_scales_the_gradient_of_the_router(text, tmp_path) -> None:
    gradients = {c: objective_and_gradients(text, tmp_path, {"load_balance": c})[1] for c in (0.0, 1.0, 2.0)}
    for name in gradients[0.0]:
        off, one, two = (gradients[c][name] for c in (0.0, 1.0, 2.0))
        assert off.norm() > 0, "the task loss alone reaches the router"
        assert (one - off).norm() > 0, "the balance loss reaches the router"
        torch.testing.assert_close(two - off, 2 * (one - off), rtol=1e-3, atol=1e-6)


def test_loss_with_coefficient_0_is_only_measured(text, tmp_path) -> None:
    measured, gradients = objective_and_gradients(text, tmp_path, {"load_balance": 0.0})
    _, without = objective_and_gradients(text, tmp_path, {})
    assert measured.raw["load_balance"] > 0
    assert measured.total.item() == measured.task.item()
    assert all(torch.equal(gradients[name], without[name]) for name in without)


def test_losses_of_the_router_are_logged_by_name(text, tmp_path) -> None:
    result, _ = objective_and_gradients(text, tmp_path, {"importance": 0.1, "load": 0.1}, router="noisy_top_k")
    assert set(result.raw) == {"importance", "load"}


class LayerWithoutLosses(torch.nn.Module):
    """A layer whose router has no losses and no objective."""

    def __init__(self) -> None:
        super().__init__()
        self.router = self

    def losses(self, record: LayerRecord) -> dict[str, torch.Tensor]:
        return {}

    def objective(self, record: LayerRecord) -> None:
        return None


def batch_of(loss_BP: torch.Tensor, count_BP: torch.Tensor | None = None) -> Batch:
    zeros_BP = torch.zeros(loss_BP.shape, dtype=torch.int64)
    return Batch(input_BL=zeros_BP, target_BP=zeros_BP, weight_BP=zeros_BP, domain_B=zeros_BP[:, 0], count_BP=count_BP)


def collapsed_record(layer: int, expert: int) -> LayerRecord:
    """Return the record of a layer where all 6 tokens go to one of 3 experts with probability 1."""
    scores_TE = torch.nn.functional.one_hot(torch.full((6,), expert), 3).float()
    expert_TK = torch.full((6, 1), expert)
    routing = Routing.from_top_k(expert_TK, torch.ones(6, 1), num_experts=3, scores_TE=scores_TE)
    return LayerRecord(layer=LayerName(layer), routing=routing, kept=routing)


def test_losses_are_averaged_over_layers_not_pooled() -> None:
    # Three layers, each collapsed to another expert: pooled over layers, f and P would be even and the loss 1.
    records = [collapsed_record(layer, expert=layer) for layer in range(3)]
    loss_BL = torch.ones(2, 3)
    for count in (1, 3):
        result = compute_objective(
            loss_BL, batch_of(loss_BL), [LayerWithoutLosses()] * count, records[:count], {"load_balance": 1.0}
        )
        assert result.raw["load_balance"].item() == pytest.approx(3.0)  # E / k, whatever the number of layers
        assert result.total.item() == pytest.approx(1.0 + 3.0)


def test_task_loss_is_the_mean_over_predictions() -> None:
    loss_BP = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    assert compute_objective(loss_BP, batch_of(loss_BP), [], [], {}).task.item() == pytest.approx(26.5)
    count_BP = torch.tensor([[1, 1], [1, 0]])
    assert compute_objective(loss_BP, batch_of(loss_BP, count_BP), [], [], {}).task.item() == pytest.approx(2.0)
    # Losses of several symbols each: 6 nats for 2 and 8 nats for 5 symbols are 2 nats per symbol.
    loss_BP, count_BP = torch.tensor([[6.0], [8.0]]), torch.tensor([[2], [5]])
    assert compute_objective(loss_BP, batch_of(loss_BP, count_BP), [], [], {}).task.item() == pytest.approx(2.0)


def test_token_without_prediction_has_the_mean_loss_of_its_sequence() -> None:
    record = collapsed_record(0, expert=0)  # 6 tokens
    loss_BP = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan]])
    batch = batch_of(loss_BP, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert add_token_loss([record], loss_BP, batch)[0].token_loss_T.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 0.0]
    loss_BP = torch.tensor([[6.0], [8.0]])
    batch = batch_of(loss_BP, torch.tensor([[2], [5]]))
    assert add_token_loss([record], loss_BP, batch)[0].token_loss_T.tolist() == pytest.approx([3.0] * 3 + [1.6] * 3)


def test_mean_over_tokens_is_weighted_by_predictions() -> None:
    value_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 60.0])
    batch = batch_of(torch.zeros(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert LossNormalizer.of_single_batch(batch).mean_over_tokens(
        value_T, batch, own_predictions=True
    ).item() == pytest.approx(15 / 5)
    # One prediction of 2 and one of 5 symbols, and the last token is padding: (2 · 2 + 5 · 4.5) / 7.
    batch = replace(
        batch_of(torch.zeros(2, 1), torch.tensor([[2], [5]])),
        valid_BL=torch.tensor([[True, True, True], [True, True, False]]),
    )
    mean = LossNormalizer.of_single_batch(batch).mean_over_tokens(value_T, batch, own_predictions=False)
    assert mean.item() == pytest.approx((2 * 2 + 5 * 4.5) / 7)


def test_one_value_per_sequence_is_divided_by_its_predictions() -> None:
    batch = batch_of(torch.zeros(2, 1), torch.tensor([[1], [3]]))
    normalizer = LossNormalizer.of_single_batch(batch)
    assert normalizer.mean_over_outputs(torch.tensor([1.0, 3.0]), batch).item() == pytest.approx(4 / 4)


def test_learning_rates_are_in_the_journal(text, tmp_path) -> None:
    config = tiny_config(text, train={"learning_rate": 0.01})
    run = Run(config, tmp_path)
    run()
    rates = [metrics["train/learning_rate"] for _, metrics in run.points() if "train/learning_rate" in metrics]
    assert rates == pytest.approx([0.01 * compute_rate_factor(step, config.train) for step in range(12)])


def nan_loss(loss_BL: torch.Tensor) -> torch.Tensor:
    return loss_BL * math.nan


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


STEP_4 = r"step 4; no update was made; batch 3 of seed 0 \(windows (\d+, ){3}\d+\), first in "


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (nan_loss, rf"^loss is nan at {STEP_4}the loss of the task: 1 of 1 values are nan$"),
        (
            InfiniteGradient.apply,
            rf"^gradient norm is (nan|inf) at {STEP_4}the gradient of the activation of head: .* values are (nan|inf)$",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_non_finite_numbers_are_refused_before_the_update(text, tmp_path, monkeypatch, spoil, reason: str) -> None:
    config = tiny_config(text, train={"checkpoint_every": 1})
    task = Watched(prepare_task(config, tmp_path), spoil, at=4)
    modules: list[CellModule] = []
    original = CellModule.__init__

    def record(self, *args) -> None:
        original(self, *args)
        modules.append(self)

    monkeypatch.setattr(CellModule, "__init__", record)
    run = Run(config, tmp_path / "run", task=task)
    with pytest.raises(NonFiniteError, match=reason):
        run()
    before = run.checkpoint(3)["state_dict"]
    after = modules[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert max(step for step, _ in run.points()) == 3


@pytest.mark.parametrize("router", ["switch", "noisy_top_k", "random"])
def test_evaluation_has_no_side_effects(text, tmp_path, router: str) -> None:
    config = tiny_config(text, router=router)
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task).train()
    batches = task.eval_batches("validation", 3)
    state = torch.get_rng_state()
    first = evaluate(model, task, batches, 0, "cpu")
    second = evaluate(model, task, batches, 0, "cpu")
    assert first.metrics == second.metrics
    assert first.load_by_layer == second.load_by_layer
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(first.load_by_layer) == {"0", "1"}


def test_evaluation_does_not_depend_on_the_batch_size(text, tmp_path) -> None:
    config = tiny_config(text, router="switch")
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task)
    with torch.no_grad():
        model.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    single, batched = (evaluate(model, task, task.eval_batches("validation", size), 0, "cpu") for size in (1, 100))
    assert single.metrics == pytest.approx(batched.metrics, rel=1e-5)
    assert single.load_by_layer == batched.load_by_layer


def test_untrained_model_has_the_loss_of_a_uniform_prediction(text, tmp_path) -> None:
    config = tiny_config(text)
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task)
    evaluation = evaluate(model, task, task.eval_batches("test", 4), 0, "cpu")
    # 257 equally likely byte tokens: log2(257) bits per byte, except for the bytes of the separator.
    assert evaluation.quality["bits_per_byte"] == pytest.approx(math.log2(257), rel=0.05)
