"""The Lightning module of a cell: training step, optimizer, and the check for non-finite losses and gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from moebench.experts.layer import update_routers
from moebench.experts.weight_casts import WeightCasts, share_casts
from moebench.models.transformer import BatchContext
from moebench.parallel.gradients import clip_grad_norm
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.routing.features.feature import TrainingPasses, count_passes
from moebench.routing.values import LayerRecord
from moebench.schema import CellConfig
from moebench.tasks.contract import check_loss
from moebench.tasks.deferred_logits import ModelOutput
from moebench.tasks.task import Batch, Task
from moebench.training.batches import BatchSource, build_loss_normalizer
from moebench.training.divergence import NonFiniteError, SpikeError
from moebench.training.evaluation import Evaluation, batch_context, evaluate, probe, training_precision
from moebench.training.first_pass import FirstPasses
from moebench.training.model import Model
from moebench.training.non_finite import trace_evaluation, trace_step
from moebench.training.objective import LossNormalizer, Objective, add_token_loss, average_passes, compute_objective
from moebench.training.optimizer.build import build_optimizer, build_schedule
from moebench.training.optimizer.clipping import can_clip_in_update, clip_in_update
from moebench.training.optimizer.schedule import compute_rate_factor
from moebench.training.rewinds import NO_REWINDS, RewindRequest, Rewinds
from moebench.training.router_states import RouterStates
from moebench.training.spikes import Spike, SpikeGuard
from moebench.training.step_values import PendingValues
from moebench.training.telemetry.collapse import WINDOW_STEPS, Collapse, CollapseAlarm, LoadWindow
from moebench.training.trainable import freeze_parameters, restore_after_updates, updates_router_state
from moebench.training.z_loss import add_z_loss


def can_defer_checks(config: CellConfig, mesh: Mesh, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a device would wait for the host, which need not know a step's loss before its update."""
    return mesh.device.type == "cuda" and config.train.spike_policy == "record" and can_clip_in_update(optimizer)


class CellModule(lightning.LightningModule):
    """Trains one model with the optimizer and the schedule of `train`.

    Losses and records of a step's micro-batches are kept until the next step. The gradient is clipped as a whole;
    `NonFiniteError` is raised before the update if it or the loss is not finite. A spike of the loss is
    treated as `train.spike_policy` says.
    """

    def __init__(
        self,
        config: CellConfig,
        model: Model,
        task: Task,
        mesh: Mesh = SINGLE_PROCESS_MESH,
        should_stop: Callable[[], bool] = lambda: False,
        rewinds: Rewinds = NO_REWINDS,
    ) -> None:
        """`should_stop`: polled in every step; all processes stop together when it is true in one of them.

        `rewinds`: those of the run so far, which decide about the batch of each step.
        """
        super().__init__()
        self.frozen_experts = freeze_parameters(model, config.train)
        self.config = config
        self.model = model
        self.task = task
        self.mesh = mesh
        self.should_stop = should_stop
        self.source = BatchSource(config=config, task=task, mesh=mesh, rewinds=rewinds)
        self.spike_guard = SpikeGuard(config.train)
        self.layers = model.backbone.moe_layers()
        self.first_passes = FirstPasses(config, model)
        self.objectives: list[Objective] = []
        self.records: list[list[LayerRecord]] = []
        """One list for each pass over each micro-batch, with one record per MoE layer."""
        self.last_loss = 0.0
        """Mean task loss of the step over all processes."""
        self.last_grad_norm = 0.0
        self.last_rate = 0.0
        self.stop_agreed = False
        self.checks_later = False  # before there is an optimizer
        """Whether a step is checked after its update: the device leaves out one that is not finite, unseen."""
        self.pending_values = PendingValues()
        self.new_spikes: list[Spike] = []
        """Not in the journal yet."""
        self.router_states = RouterStates(self.layers)
        self.weight_casts = WeightCasts()
        self.has_telemetry = True
        """Whether layers are watched and their values recorded; only the step benchmark leaves it out."""
        self.load_window, self.collapse_alarm = LoadWindow(self.layers), CollapseAlarm(self.layers)
        self.new_collapses: list[Collapse] = []
        """Not in the journal yet."""

    @override
    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        micro_batch = batch_index % self.config.train.accumulate
        if micro_batch == 0:
            self.objectives, self.records = [], []
        ctx = batch_context(batch, training=True, seed=self.config.seed, step=self.global_step, micro_batch=micro_batch)
        normalizer = build_loss_normalizer(batch, self.config, self.mesh)
        with self.first_passes.watch("training"):
            outputs, records = self.run_passes(batch, ctx)
            objective, records = self.compute_loss(batch, outputs, records, normalizer)
            self.first_passes.check_losses(records[0])
        self.objectives.append(objective.detach())
        self.records += records
        return objective.total

    def run_passes(self, batch: Batch, ctx: BatchContext) -> tuple[list[ModelOutput], list[list[LayerRecord]]]:
        """Return the outputs and records of each forward pass over a batch; passes differ in what routers draw."""
        contexts = [replace(ctx, repeat=repeat) for repeat in range(count_passes(self.model.features))]
        with share_casts(self.weight_casts):
            outputs, records = zip(*(self.model(batch, each) for each in contexts), strict=True)
        return list(outputs), list(records)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with share_casts(self.weight_casts):  # blocks that are computed again read weights
            super().backward(loss, *args, **kwargs)

    def compute_loss(
        self,
        batch: Batch,
        outputs: Sequence[ModelOutput],
        records: Sequence[list[LayerRecord]],
        normalizer: LossNormalizer | None = None,
    ) -> tuple[Objective, list[list[LayerRecord]]]:
        """Return the loss of the passes over a batch, and their records with each token's loss.

        `normalizer`: None: the batch is its whole step.
        """
        normalizer = normalizer or LossNormalizer.of_single_batch(batch)
        objectives, records_with_loss = [], []
        for output, pass_records in zip(outputs, records, strict=True):
            loss_BP = check_loss(self.config.task.name, self.task.loss(output, batch), batch)
            records_with_loss.append(add_token_loss(pass_records, loss_BP, batch))
            objectives.append(
                compute_objective(
                    loss_BP, batch, self.layers, records_with_loss[-1], self.config.router.losses, normalizer
                )
            )
        objective = self._add_feature_losses(average_passes(objectives), batch, outputs, normalizer)
        return add_z_loss(objective, self.config.train.z_loss, outputs, batch, normalizer), records_with_loss

    def _add_feature_losses(
        self, objective: Objective, batch: Batch, outputs: Sequence[ModelOutput], normalizer: LossNormalizer
    ) -> Objective:
        model, task = self.model, self.task
        passes = TrainingPasses(
            outputs=outputs,
            input_vectors=lambda: model.embed(batch.input_BL),
            task_loss=lambda output: normalizer.mean(task.loss(output, batch), batch),
            log_probabilities=task.log_probabilities,
            mean=lambda value_B: normalizer.mean_over_outputs(value_B, batch),
        )
        for feature in model.features:
            loss = feature.compute_loss(passes, model.feature_module(feature))
            if loss is not None:
                objective = objective.add(loss.name, loss.raw, loss.coefficient)
        return objective

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.weight_casts.clear()  # their memory is for the update
        losses = torch.stack([torch.stack([part.total, part.task]) for part in self.objectives]).double().mean(0)
        stop_request = torch.full((1,), float(self.should_stop()), dtype=losses.dtype, device=losses.device)
        sums = self.mesh.world.sum(torch.cat([losses / self.mesh.size, stop_request]))
        for experts in self.frozen_experts:
            experts.clear_gradient()
        if self.checks_later:
            norm = clip_in_update(optimizer, self.parameters(), self.config.train.clip_norm, sums[0])
        else:
            norm = clip_grad_norm(self.parameters(), self.config.train.clip_norm)
        self.pending_values.put(self.global_step, torch.cat([sums, norm.double().view(1), *self._count_loads()]))
        self.last_rate = self.config.train.learning_rate * compute_rate_factor(self.global_step, self.config.train)
        # The values of the step before are there by now: the device has work, and the host does not wait for it.
        self.check_steps(keep=1 if self.checks_later else 0)

    def _count_loads(self) -> list[Tensor]:
        """Add the loads of the step to the window; return its sums where it ends, fp64."""
        if not self.has_telemetry:
            return []
        self.load_window.add(self.records)
        is_end = (self.global_step + 1) % WINDOW_STEPS == 0
        load_X = self.load_window.close(self.mesh.world) if is_end else None
        return [] if load_X is None else [load_X.double()]

    def check_steps(self, *, keep: int = 0) -> None:
        """Check the steps whose values are pending, all but the latest `keep`; act as `train.spike_policy` says.

        Raises NonFiniteError; if the check comes after the update, the device has left the update out.
        """
        for values in self.pending_values.take(keep=keep):
            self.last_loss, self.last_grad_norm = values.task_loss, values.grad_norm
            self.stop_agreed = values.num_stop_requests > 0
            self._require_finite(values.total_loss, "loss", values.step)
            self._require_finite(values.grad_norm, "gradient norm", values.step)
            if values.window_loads:
                self.new_collapses += self.collapse_alarm.check(values.step + 1, values.window_loads)
            self._apply_spike_policy(values.step)

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            self.router_states.restore(step)
            raise NonFiniteError(
                f"{what} is {value} at step {step + 1}; no update was made; {self.source.name_batch(step)},"
                f" {trace_step(self, step)}"
            )

    def _apply_spike_policy(self, step: int) -> None:
        """Compare the step with those before it, and do what the policy says; all processes decide the same."""
        policy = self.spike_guard.policy
        spike = self.spike_guard.check(
            step + 1, self.last_loss, self.last_grad_norm, lambda: self.source.name_batch(step)
        )
        if spike is None:
            return
        self.new_spikes.append(spike)
        if policy == "stop":
            raise SpikeError(f"{spike}; no update was made (train.spike_policy=stop)")
        if policy == "rewind":
            raise RewindRequest(spike)
        if policy == "skip":
            self.zero_grad(set_to_none=True)  # the optimizer leaves parameters and its state as they are

    @property
    def is_update_skipped(self) -> bool:
        """Whether the policy left out the update of the last step."""
        return self.spike_guard.policy == "skip" and self.spike_guard.latest is not None

    def save_telemetry(self) -> dict[str, Any]:
        """Return the state of the alarm for a checkpoint, as plain values; call `load_window.sum_over` first."""
        return {"window": self.load_window.to_list(), "alarm": self.collapse_alarm.to_dict()}

    def load_telemetry(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the alarm."""
        self.load_window.load_list(state["window"], self.mesh.device)
        self.collapse_alarm.load_dict(state["alarm"])

    def update_routers(self) -> None:
        """Update the state of routers from the loads of the step; call after the update and before a checkpoint."""
        if self.is_update_skipped or not updates_router_state(self.config.train):
            return
        if self.checks_later:
            self.router_states.save(self.global_step - 1)
        update_routers(self.layers, list(zip(*self.records, strict=True)))

    def evaluate(self, split: str) -> Evaluation:
        """Evaluate the model on a split of the task's fixed evaluation set, in the precision of training."""
        batches = self.task.eval_batches(split, self.config.train.batch_size)
        precision = training_precision(self.config.train, self.device)
        with precision, share_casts(self.weight_casts), self.first_passes.watch("evaluation"):
            evaluation = evaluate(self.model, self.task, batches, self.config.seed, self.device, self.mesh)
        if evaluation.is_finite:
            return evaluation
        place = f"the {split} split gives values that are not finite after step {self.global_step}"
        return replace(evaluation, problem=f"{place}: {trace_evaluation(self, batches)}")

    def evaluate_trained(self) -> Evaluation:
        """Evaluate on the test split, and add what the task measures only on a trained model."""
        evaluation = self.evaluate("test")
        train, seed = self.config.train, self.config.seed
        with training_precision(train, self.device):
            probed = probe(self.model, self.task, train.batch_size, seed, self.device, self.mesh)
        return replace(evaluation, quality=evaluation.quality | probed)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.config, self.model, self.task, self.mesh)
        restore_after_updates(optimizer, self.frozen_experts)
        optimizer.register_step_post_hook(lambda *_: self.weight_casts.clear())
        self.checks_later = can_defer_checks(self.config, self.mesh, optimizer)
        schedule = build_schedule(self.config, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
