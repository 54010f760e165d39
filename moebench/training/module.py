"""The Lightning module of a cell: one training step, the optimizer, and the guard against non-finite numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moebench.models.transformer import BatchContext
from moebench.parallel.expert_sharding import iter_sharded_banks
from moebench.parallel.gradients import clip_grad_norm
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.router import ROUTERS
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig, TrainConfig
from moebench.tasks.task import Batch, Task
from moebench.training.batches import build_loss_normalizer
from moebench.training.evaluation import Evaluation, batch_context, evaluate, probe, training_precision
from moebench.training.model import Model
from moebench.training.objective import LossNormalizer, Objective, add_token_loss, agreeing, compute_objective


class NonFiniteError(Exception):
    """A loss or gradient is not a number: raised before the update, so the parameters are still those before it."""


class CellModule(lightning.LightningModule):
    """Trains one model; what a step found, in all its micro-batches, lies here until the next step."""

    def __init__(
        self,
        config: CellConfig,
        model: Model,
        task: Task,
        mesh: Mesh = SINGLE_PROCESS_MESH,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`should_stop`: asked in every step; the processes stop together, when one of them is asked to."""
        super().__init__()
        self.config = config
        self.model = model
        self.task = task
        self.mesh = mesh
        self.should_stop = should_stop
        self.layers = model.backbone.moe_layers()
        self.embedding_loss = ROUTERS.get(config.router.name).item.embedding(config.router)[1]
        self.consistency = max((layer.router.consistency for layer in self.layers), default=0.0)
        self.objectives: list[Objective] = []
        self.records: list[list[LayerRecord]] = []
        """Of each pass over each micro-batch, one record per MoE layer."""
        self.last_loss = 0.0
        """Mean task loss of the step, of all processes."""
        self.last_grad_norm = 0.0
        self.last_rate = 0.0
        self.stop_agreed = False

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one micro-batch."""
        micro_batch = batch_index % self.config.train.accumulate
        if micro_batch == 0:
            self.objectives, self.records = [], []
        ctx = batch_context(batch, training=True, seed=self.config.seed, step=self.global_step, micro_batch=micro_batch)
        outputs, records = self.passes(batch, ctx)
        found, records = self.judge(batch, outputs, records, build_loss_normalizer(batch, self.config, self.mesh))
        self.objectives.append(found.detached())
        self.records += records
        return found.total

    def passes(self, batch: Batch, ctx: BatchContext) -> tuple[list[Tensor], list[list[LayerRecord]]]:
        """Return the outputs and records of one pass over a batch, or of two that differ in what is drawn."""
        contexts = [replace(ctx, repeat=repeat) for repeat in range(2 if self.consistency else 1)]
        outputs, records = zip(*(self.model(batch, each) for each in contexts), strict=True)
        return list(outputs), list(records)

    def judge(
        self,
        batch: Batch,
        outputs: Sequence[Tensor],
        records: Sequence[list[LayerRecord]],
        share: LossNormalizer | None = None,
    ) -> tuple[Objective, list[list[LayerRecord]]]:
        """Return the loss of the passes over a batch, and their records with each token's loss."""
        share = share or LossNormalizer.of_single_batch(batch)
        found, seen = [], []
        for output, of_pass in zip(outputs, records, strict=True):
            loss_BP = self.task.loss(output, batch)
            seen.append(add_token_loss(of_pass, loss_BP, batch))
            found.append(compute_objective(loss_BP, batch, self.layers, seen[-1], self.config.router.losses, share))
        whole = found[0]
        if len(found) > 1:
            whole = agreeing(found, outputs, self.task, batch, self.consistency, share)
        if self.model.shared is not None:
            own = share.mean(self.task.loss(self.model.said_by_shared(batch), batch), batch)
            whole = whole.plus("embedding", own, self.embedding_loss)
        return whole, seen

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the whole gradient; raise NonFiniteError before the update if it or the loss is not finite."""
        found = torch.stack([torch.stack([part.total, part.task]) for part in self.objectives]).double().mean(0)
        wish = found.new_tensor([float(self.should_stop())])
        total, self.last_loss, wishes = self.mesh.world.sum(torch.cat([found / self.mesh.size, wish])).tolist()
        self.stop_agreed = wishes > 0
        self._require_finite(total, "loss")
        self.last_grad_norm = clip_grad_norm(self.parameters(), self.config.train.clip_norm).item()
        self._require_finite(self.last_grad_norm, "gradient norm")
        self.last_rate = optimizer.param_groups[0]["lr"]  # of this update: the schedule moves on right after it

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(f"{what} is {value} at step {self.global_step + 1}; no update was made")

    def update_routers(self) -> None:
        """Let routers with state see the loads of the step: after the update, before anything is saved."""
        for layer, records in zip(self.layers, zip(*self.records, strict=True), strict=True):
            layer.after_step(records)

    def evaluate(self, split: str) -> Evaluation:
        """Evaluate the model on a split of the task's fixed evaluation set, in the precision of training."""
        batches = self.task.eval_batches(split, self.config.train.batch_size)
        with training_precision(self.config.train, self.device):
            return evaluate(self.model, self.task, batches, self.config.seed, self.device, self.mesh)

    def evaluate_trained(self) -> Evaluation:
        """Evaluate on the test split, and add what the task measures on a trained model alone."""
        found = self.evaluate("test")
        train, seed = self.config.train, self.config.seed
        with training_precision(train, self.device):
            more = probe(self.model, self.task, train.batch_size, seed, self.device, self.mesh)
        return replace(found, quality=found.quality | more)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW (decay on matrices only) and the warm-up and cosine schedule."""
        train = self.config.train
        # Apart, because the fused update takes one kind of tensor; the same groups whether experts are spread or not.
        experts = {id(p) for layer in self.layers for bank in iter_sharded_banks(layer.bank) for p in bank.parameters()}
        stacks = [p for p in self.parameters() if id(p) in experts]
        matrices = [p for p in self.parameters() if id(p) not in experts and p.dim() >= 2]
        vectors = [p for p in self.parameters() if id(p) not in experts and p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        groups += [{"params": stacks}] if stacks else []
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
