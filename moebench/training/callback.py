"""What happens between the steps of a cell: logging, evaluation, checkpoints, progress reports, stopping."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from typing_extensions import override

from moebench.parallel.checkpoint import checkpoint_path
from moebench.parallel.replicas import check_replicas
from moebench.printable import print_text
from moebench.runs.recorder import RunRecorder
from moebench.schema import TrainConfig
from moebench.training.budget import Budget, build_budget
from moebench.training.evaluation import Evaluation
from moebench.training.executed_cost import ExecutedCost
from moebench.training.kept_weights import save_kept_weights
from moebench.training.module import CellModule
from moebench.training.objective import average_objectives
from moebench.training.spikes import SpikeGuard
from moebench.training.step_metrics import ParallelCosts, compute_parallel_metrics, measure_load
from moebench.training.step_timer import StepTimer
from moebench.training.system_usage import SystemUsage
from moebench.training.utilization import compute_mfu, count_training_flops, find_peak_flops


@dataclass(frozen=True)
class RunContext:
    """Where a training run records, saves and reports, and what stops it."""

    recorder: RunRecorder
    checkpoints: Path
    """Folder of the checkpoints."""
    results: Path = Path("results")
    """Results folder, whose runs `init.from` can name."""
    report_progress: Callable[[dict[str, Any]], None] = lambda message: None
    """Called after every step with step, loss and tokens_per_s."""
    should_stop: Callable[[], bool] = lambda: False
    """Called in every step; True ends the run after the step, with a checkpoint."""
    report_note: Callable[[str], None] = print
    """Called with a line for the user."""
    report_activity: Callable[[str], None] = lambda phase: None
    """Called with "active" for every batch, of training and of evaluations, and with "saving" before a checkpoint."""


class CellCallback(lightning.Callback):
    """Logs, evaluates and saves one cell at the intervals of its configuration.

    Its state is part of every checkpoint, so that the means of a resumed run are those of all its steps.
    """

    def __init__(self, context: RunContext, timer: StepTimer, cell_id: str | None = None) -> None:
        """`cell_id`: whose checkpoints are written; None: it is not recorded in them."""
        self.context = context
        self.cell_id = cell_id
        self.timer = timer
        self.is_stopped = False
        """Whether the run was stopped before its last step."""
        self.parallel_costs = ParallelCosts()
        self.executed_cost = ExecutedCost(())
        """Cost of all training steps."""
        self.budget: Budget | None = None
        """What holds the cost at a target; None where the cell has none."""
        self.peak_flops: float | None = None
        """FLOP/s of the device in the products of the cell; None: not known."""
        self.system_usage: SystemUsage | None = None
        """Usage of the recording process; None before training."""
        self.spike_guard: SpikeGuard | None = None
        """Guard of the module; its state is part of a checkpoint."""
        self.watched: CellModule | None = None
        """The module whose alarm of collapses is part of a checkpoint."""
        self.final: Evaluation | None = None
        """Evaluation on the test split, after the last step; None before."""
        self.validation: Evaluation | None = None
        """The latest evaluation on the validation split; None before the first."""

    @override
    def setup(self, trainer: Any, pl_module: lightning.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, CellModule)
        self.executed_cost = ExecutedCost(pl_module.layers)  # before a checkpoint is loaded
        self.budget = build_budget(pl_module.config, pl_module.model, pl_module.task)
        self.spike_guard, self.watched = pl_module.spike_guard, pl_module
        self.peak_flops = find_peak_flops(pl_module.config.train, pl_module.mesh.device)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.timer.durations_s,
            "tokens": self.timer.num_tokens,
            "waits": self.timer.data_waits_s,
            "parallel": self.parallel_costs.sums,
            "num_timed": self.parallel_costs.num_steps,
            "execution": self.executed_cost.to_list(),
            "budget": self.budget.state_dict() if self.budget else None,
            "spikes": self.spike_guard.state_dict() if self.spike_guard else None,
            "collapses": self.watched.save_telemetry() if self.watched else None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.executed_cost.load_list(state_dict["execution"])
        self.timer.restore(state_dict["seconds"], state_dict["tokens"], state_dict["waits"])
        self.parallel_costs = ParallelCosts(sums=state_dict["parallel"], num_steps=state_dict["num_timed"])
        if self.budget and state_dict.get("budget"):
            self.budget.load_state_dict(state_dict["budget"])
        if self.spike_guard and state_dict.get("spikes"):  # earlier versions did not write them
            self.spike_guard.load_state_dict(state_dict["spikes"])
        if self.watched and state_dict.get("collapses"):
            self.watched.load_telemetry(state_dict["collapses"])

    @override
    def on_train_start(self, trainer: Any, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, CellModule)
        self.timer.uses_events = pl_module.mesh.device.type == "cuda"
        self.system_usage = SystemUsage(pl_module.mesh.device)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, CellModule)
        train = pl_module.config.train
        if batch_idx % train.accumulate == 0:
            pl_module.mesh.traffic.reset(is_timed=self._is_logged(train, trainer.global_step + 1))
            self.timer.start()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, CellModule)
        if (batch_idx + 1) % pl_module.config.train.accumulate == 0:
            self._finish_step(trainer, pl_module)

    def _finish_step(self, trainer: Any, module: CellModule) -> None:
        train, step = module.config.train, trainer.global_step
        is_last = step == train.steps
        is_read = self._is_logged(train, step) or self._is_followed(module, step)
        if is_read:
            module.check_steps()
        module.update_routers()
        if self.budget:
            self.budget.update(module.records, module.mesh)
        module.mesh.traffic.stop_counting()
        self.timer.stop(module.device, module.source.count_positions(step - 1))
        if is_read:
            self.timer.settle()
        for records in module.records:
            self.executed_cost.add(records)
        self._record_spikes(module, step - 1)
        self._record_collapses(module, step - 1)
        if self._is_logged(train, step):
            self._log(module, step)
        self._record_spikes(module, step)
        self._record_collapses(module, step)
        if step % module.config.parallel.check_every == 0 or is_last:
            check_replicas(module, module.mesh)
        if is_last and self.budget:
            self.budget.freeze(lambda: module.evaluate("validation").load["load/flops_per_token"])
        if step % train.eval_every == 0 or is_last:
            self._validate(module, step)
        if is_last:
            self.final = module.evaluate_trained()
            metrics = {f"test/{name}": value for name, value in self.final.metrics.items()}
            self.context.recorder.append(step, metrics)
        self.is_stopped = not is_last and module.stop_agreed
        # A rewind goes to the last checkpoint: one that depends on when the run was stopped would change the result.
        saves_on_stop = self.is_stopped and train.spike_policy != "rewind"
        if step in train.kept_steps:  # before a checkpoint of this step: a run that resumes from it has the weights
            self.context.report_activity("saving")
            save_kept_weights(trainer, module, self.context.checkpoints, self.cell_id)
        if step % train.checkpoint_every == 0 or is_last or saves_on_stop:
            self._save(trainer, module, step)
        trainer.should_stop = trainer.should_stop or self.is_stopped
        progress = {"step": step, "loss": module.last_loss, "tokens_per_s": self.timer.recent_tokens_per_s}
        self.context.report_progress(progress | {"num_collapsed": module.collapse_alarm.num_collapsed})

    @staticmethod
    def _is_followed(module: CellModule, step: int) -> bool:
        """Return whether something follows a step that needs to know how it ended, besides the log."""
        train = module.config.train
        intervals = (train.eval_every, train.checkpoint_every, module.config.parallel.check_every)
        return any(step % interval == 0 for interval in intervals) or step in train.kept_steps

    @staticmethod
    def _is_logged(train: TrainConfig, step: int) -> bool:
        return step % train.log_every == 0 or step in (1, train.steps)

    def _log(self, module: CellModule, step: int) -> None:
        speed = self.timer.num_tokens[-1] / self.timer.durations_s[-1]
        metrics = average_objectives(module.objectives, module.mesh.world) | {
            "train/learning_rate": module.last_rate,
            "train/grad_norm": module.last_grad_norm,
            "train/tokens_per_s": speed,
            "time/data_share": self.timer.data_share,
        }
        load = measure_load(module)
        metrics |= {f"train/{name}": value for name, value in load.metrics.items()}
        if self.peak_flops:
            flops = count_training_flops(module.model, module.task, load.metrics)
            metrics["train/mfu"] = compute_mfu(flops, speed, self.peak_flops * module.mesh.size)
        parallel_metrics = compute_parallel_metrics(module, self.timer)
        self.parallel_costs.add(step, parallel_metrics)
        usage = self.system_usage.measure() if self.system_usage and module.mesh.is_first else {}
        self.context.recorder.append(step, metrics | parallel_metrics | usage)
        if load.layers:
            self.context.recorder.record_layers(step, load.layers)

    def _record_spikes(self, module: CellModule, last_step: int) -> None:
        """Record the new spikes up to a step; those of a step whose update is skipped are known before it ends."""
        while module.new_spikes and module.new_spikes[0].step <= last_step:
            spike = module.new_spikes.pop(0)
            module.spike_guard.record(spike, "skipped" if module.is_update_skipped else "recorded")
            self.context.recorder.append(spike.step, spike.metrics)
            if module.mesh.is_first:
                print_text(f"{spike}" + ("; its update is skipped" if module.is_update_skipped else ""))

    def _record_collapses(self, module: CellModule, last_step: int) -> None:
        """Record layers that have collapsed or recovered up to a step, and tell the user."""
        events = [event for event in module.new_collapses if event.step <= last_step]
        module.new_collapses = module.new_collapses[len(events) :]
        for step in dict.fromkeys(event.step for event in events):
            metrics = {"collapse/layers": float(module.collapse_alarm.num_collapsed)}
            for event in events:
                metrics |= event.metrics if event.step == step else {}
            self.context.recorder.append(step, metrics)
        for event in events if module.mesh.is_first else ():
            self.context.report_note(str(event))

    def _validate(self, module: CellModule, step: int) -> None:
        self.validation = module.evaluate("validation")
        if self.validation.problem and module.mesh.is_first:
            print_text(self.validation.problem)
        metrics = {f"eval/{name}": value for name, value in self.validation.metrics.items()}
        self.context.recorder.append(step, metrics | {"time/train_s": sum(self.timer.durations_s)})
        if self.validation.load_by_layer:
            self.context.recorder.record_load(step, self.validation.load_by_layer)

    def _save(self, trainer: Any, module: CellModule, step: int) -> None:
        self.context.report_activity("saving")
        module.check_steps()  # a run that is stopped ends at a step like any other
        self.timer.settle()
        self._record_spikes(module, step)
        self._record_collapses(module, step)
        module.load_window.sum_over(module.mesh.world)
        self.executed_cost.all_reduce(module.mesh)  # every process saves the sums over all of them
        self.context.recorder.flush()  # the journal is on the disk before a checkpoint claims its steps
        fields = {"cell": self.cell_id, "records": self.context.recorder.describe()}
        trainer.save_checkpoint(checkpoint_path(self.context.checkpoints, step), storage_options=fields)
        self.context.recorder.append_missing(step, module.source.rewinds.metrics(step))
