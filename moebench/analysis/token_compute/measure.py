"""Experts and loss of every token of the test split, under an arm and under the dense arm of the same seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebench.analysis.specialisation.routed_tokens import DEFAULT_TOKENS, select_batches
from moebench.analysis.token_compute.runs import SeedPair
from moebench.analysis.trained_run import TrainedRun
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch, Task
from moebench.training.evaluation import batch_context, evaluation_mode, training_precision
from moebench.training.model import Model, prepare_task
from moebench.training.objective import add_token_loss
from moebench.training.train import select_device

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Tokens whose loss is known, N of them. Of an encoder and a decoder: those of the half of the last layer."""

    num_experts: int
    count: Mapping[str, NDArray[np.int64]]
    """MoE layer -> experts that computed each token, after capacity, [N]."""
    own_loss: Values
    """Loss of the prediction at the token, in nats, [N]; of its sequence if tokens predict nothing."""
    dense_loss: Values | None
    """Loss in the dense arm, same shape."""
    sequence: NDArray[np.int64]
    """Sequence that each token belongs to, [N]."""

    @property
    def mean_count(self) -> Values:
        """Experts per token, mean over the layers."""
        mean: Values = np.mean(np.stack(list(self.count.values())), axis=0)
        return mean


def measure_tokens(pair: SeedPair, results: Path, max_tokens: int = DEFAULT_TOKENS) -> TokenTable:
    """Evaluate a run and its dense reference on the same tokens of the test split, as `select_batches` chooses them."""
    config = pair.run.config
    task = prepare_task(config, results)
    torch.set_num_threads(config.train.threads)
    device = select_device(config.train)
    model = TrainedRun.from_task(pair.run, task).load_model()
    dense = TrainedRun.from_task(pair.dense, task).load_model() if pair.dense else None
    parts: list[dict[str, Tensor]] = []
    num_sequences = 0
    with training_precision(config.train, device):
        for number, batch in select_batches(task, config.train.batch_size, max_tokens).batches:
            part = _measure_batch(batch.to(device), number, config.seed, task, (model, dense))
            part["sequence"] += num_sequences
            num_sequences += len(batch.domain_B)
            parts.append(part)
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    layers = [name for name in columns if name.startswith("layer ")]
    return TokenTable(
        num_experts=model.backbone.moe_layers()[-1].bank.num_experts,
        count={name.removeprefix("layer "): columns[name] for name in layers},
        own_loss=columns["own"],
        dense_loss=columns.get("dense"),
        sequence=columns["sequence"],
    )


def _measure_batch(
    batch: Batch, number: int, seed: int, task: Task, models: tuple[Model, Model | None]
) -> dict[str, Tensor]:
    """Return the columns of the tokens of a batch, on the CPU."""
    model, dense = models
    ctx = batch_context(batch, training=False, seed=seed, micro_batch=number)
    with evaluation_mode(model):
        output, records = model(batch, ctx)
        own_loss_BP = task.loss(output, batch)
    last = records[-1]
    shown = [record for record in records if record.layer.half == last.layer.half]
    columns = {"own": _token_loss(last, own_loss_BP, batch)}
    if dense is not None:
        with evaluation_mode(dense):
            columns["dense"] = _token_loss(last, task.loss(dense(batch, ctx)[0], batch), batch)
    columns |= {f"layer {record.layer}": record.kept.experts_per_token_T.long() for record in shown}
    num_tokens, num_sequences = last.routing.num_tokens, len(batch.domain_B)
    columns["sequence"] = torch.arange(num_sequences).repeat_interleave(num_tokens // num_sequences)
    is_known_T = _find_known(last, batch)
    return {name: value.cpu()[is_known_T] for name, value in columns.items()}


def _token_loss(record: LayerRecord, loss_BP: Tensor, batch: Batch) -> Tensor:
    loss_T = add_token_loss([record], loss_BP, batch)[0].token_loss_T
    assert loss_T is not None
    return loss_T.double()


def _find_known(record: LayerRecord, batch: Batch) -> Tensor:
    """Return which tokens are no padding and have a prediction; tokens without predictions of their own all count."""
    is_known_T = torch.ones(record.routing.num_tokens, dtype=torch.bool)
    if record.valid_T is not None:
        is_known_T &= record.valid_T.cpu()
    has_own = record.layer.half != "encoder" and record.routing.num_tokens == batch.weight_BP.numel()
    if has_own and batch.count_BP is not None:
        is_known_T &= (batch.count_BP > 0).reshape(-1).cpu()
    return is_known_T
