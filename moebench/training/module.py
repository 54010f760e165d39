"""The Lightning module of a cell: one training step, the optimizer, and the guard against non-finite numbers."""

import math
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig, TrainConfig
from moebench.tasks.task import Batch, Task
from moebench.training.evaluate import Evaluation, batch_context, evaluate
from moebench.training.model import Model
from moebench.training.objective import Objective, objective


class NonFiniteError(Exception):
    """A loss or gradient is not a number: raised before the update, so the parameters are still those before it."""


class CellModule(lightning.LightningModule):
    """Trains one model; what a step found lies in `last` until the next step."""

    def __init__(self, config: CellConfig, model: Model, task: Task) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.task = task
        self.layers = model.backbone.moe_layers()
        self.last: Objective | None = None
        self.last_records: list[LayerRecord] = []
        self.last_grad_norm = 0.0
        self.last_rate = 0.0

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one batch; raise NonFiniteError if it is not a number."""
        step = self.global_step
        output, records = self.model(batch, batch_context(batch, training=True, seed=self.config.seed, step=step))
        token_loss_BL = self.task.token_loss(output, batch)
        self.last = objective(token_loss_BL, batch, self.layers, records, self.config.router.losses)
        if not math.isfinite(self.last.total.item()):
            raise NonFiniteError(f"loss is {self.last.total.item()} at step {step + 1}; no update was made")
        self.last_records = records
        return self.last.total

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the whole gradient; raise NonFiniteError before the update if its norm is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.train.clip_norm).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm} at step {self.global_step + 1}; no update was made")
        self.last_grad_norm = norm
        self.last_rate = optimizer.param_groups[0]["lr"]  # of this update: the schedule moves on right after it

    def update_routers(self) -> None:
        """Let routers with state see the loads of the step: after the update, before anything is saved."""
        for layer, record in zip(self.layers, self.last_records, strict=True):
            layer.after_step([record])

    def evaluate(self, split: str) -> Evaluation:
        """Evaluate the model on a split of the task's fixed evaluation set."""
        batches = self.task.eval_batches(split, self.config.train.batch_size)
        return evaluate(self.model, self.task, batches, self.config.seed, self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW (decay on matrices only) and the warm-up and cosine schedule."""
        train = self.config.train
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups,
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, train))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate_at(step: int, train: TrainConfig) -> float:
    """Return the learning rate of an update (counted from 0) as a share of the peak."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    return train.final_rate + (1 - train.final_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
