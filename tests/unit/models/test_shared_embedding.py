"""The embedding that all routers of a model share: which routers read it, what trains it, what it costs."""

from pathlib import Path

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text
from torch import Tensor

from moebench.compatibility import check_cell
from moebench.errors import UsageError
from moebench.tasks.task import Batch
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, compute_model_cost, prepare_task
from moebench.training.module import CellModule

SHARED = {"name": "speech_moe", "embedding": "shared", "embedding_width": 6}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def module_of(text: Path, folder: Path, **router: object) -> CellModule:
    config = tiny_config(text, router=SHARED | router)
    task = prepare_task(config, folder)
    module = CellModule(config, build_initialised_model(config, task), task)
    with torch.no_grad():  # heads start at zero and would let no gradient through
        for head in (module.model.head, module.model.shared.head):
            head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return module


def predict(module: CellModule, batch: Batch) -> Tensor:
    """Return the output of the shared embedding's own head."""
    shared = module.model.shared
    return shared.head(shared(module.model.embedding(batch.input_BL)))


def compute_losses(module: CellModule):
    batch = module.task.train_batch(4, 0, 0)
    outputs, records = module.run_passes(batch, batch_context(batch, training=True, seed=0))
    return module.compute_loss(batch, outputs, records)[0], outputs, batch


def test_loss_of_the_shared_embedding_is_the_task_loss_of_its_own_prediction(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path, embedding_loss=0.5)
    objective, outputs, batch = compute_losses(module)
    alone = module.task.loss(predict(module, batch), batch).mean()
    torch.testing.assert_close(objective.raw["embedding"], alone)
    torch.testing.assert_close(objective.weighted["embedding"], 0.5 * alone)
    torch.testing.assert_close(objective.task, module.task.loss(outputs[0], batch).mean())
    torch.testing.assert_close(objective.total, objective.task + sum(objective.weighted.values()))


def test_the_shared_embedding_learns_from_its_loss_and_the_routers_and_passes_no_gradient_down(
    text: Path, tmp_path: Path
) -> None:
    module = module_of(text, tmp_path)
    batch = module.task.train_batch(4, 0, 0)
    embedding_loss = module.task.loss(predict(module, batch), batch).sum()
    first, table = module.model.shared.first.weight, module.model.embedding.weight
    by_own, below = torch.autograd.grad(embedding_loss, [first, table], allow_unused=True)
    assert by_own.norm() > 1e-4
    assert below is None
    _, outputs, _ = compute_losses(module)
    (by_task,) = torch.autograd.grad(module.task.loss(outputs[0], batch).sum(), [first])
    assert by_task.norm() > 1e-6  # through the gates of all layers


def test_every_router_reads_the_shared_embedding(text: Path, tmp_path: Path) -> None:
    module = module_of(text, tmp_path)
    batch = module.task.train_batch(4, 0, 0)
    ctx = batch_context(batch, training=False, seed=0)
    _, before = module.model(batch, ctx)
    with torch.no_grad():
        module.model.shared.second.weight.mul_(-3)
    _, after = module.model(batch, ctx)
    assert not torch.equal(before[0].routing.logits_TE, after[0].routing.logits_TE)
    assert module.layers[0].router.gate.weight_ED.shape == (4, 8 + 6)


def test_its_cost_is_counted(text: Path, tmp_path: Path) -> None:
    with_it = compute_model_cost(module_of(text, tmp_path).model, 8)
    without = compute_model_cost(module_of_layer(text, tmp_path), 8)
    gates = 2 * 2 * 4 * 6  # two layers of 4 experts read 6 numbers more
    assert with_it.flops_per_token - without.flops_per_token == 2 * (8 * 6 + 6 * 6) + gates
    assert with_it.total_params - without.total_params == 8 * 6 + 6 * 6 + 6 * 257 + 2 * 4 * 6


def module_of_layer(text: Path, folder: Path):
    config = tiny_config(text, router={"name": "speech_moe"})
    return build_initialised_model(config, prepare_task(config, folder))


def test_it_trains_and_logs_its_loss(text: Path, tmp_path: Path) -> None:
    run = Run(tiny_config(text, router=SHARED), tmp_path)
    assert run() is not None
    losses = [metrics["balance/embedding"] for _, metrics in run.points() if "balance/embedding" in metrics]
    assert losses[-1] < losses[0]


def test_mistakes_are_refused(text: Path) -> None:
    for wrong, words in (
        (
            {"router": SHARED, "task": {"name": "span_corruption", "sequence_length": 16}},
            "router.name: 'speech_moe' needs one",
        ),
        ({"router": SHARED | {"embedding_width": 0}}, "router.embedding_width"),
        ({"router": SHARED | {"embedding_loss": -1.0}}, "router.embedding_loss"),
    ):
        with pytest.raises(UsageError) as refusal:
            check_cell(tiny_config(text, **wrong))
        assert str(refusal.value).startswith(words)
        assert "\n" not in str(refusal.value)
