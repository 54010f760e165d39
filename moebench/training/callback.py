"""What happens between the steps of a cell: journal, evaluation, checkpoints, progress, stopping."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch

from moebench.parallel.checkpoint import checkpoint_path
from moebench.parallel.replicas import check_replicas
from moebench.runs.recorder import RunRecorder
from moebench.schema import TrainConfig
from moebench.training.evaluation import Evaluation
from moebench.training.executed_cost import ExecutedCost
from moebench.training.module import CellModule
from moebench.training.objective import average_objectives
from moebench.training.step_metrics import ParallelCosts, load_metrics, parallel_metrics

WARM_UP_STEPS = 3
"""Steps of a process that throughput leaves out: first calls allocate and compile."""
RECENT_STEPS = 32
"""Steps that the speed shown while a cell trains is taken from."""


@dataclass(frozen=True)
class RunContext:
    """How a cell talks to the world while it trains."""

    recorder: RunRecorder
    progress: Callable[[dict[str, Any]], None] = lambda message: None
    """Called after every step with step, loss and tokens_per_s."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step; True ends the cell at a checkpoint."""


@dataclass
class StepTimer:
    """Time spent inside steps: from the batch's arrival to the end of the update, evaluations and logs left out."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each step, padding left out."""
    waits: list[float] = field(default_factory=list)
    """Seconds for which each step waited for its batch, not counted in `seconds`."""
    _counted_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sums of `waits` and `seconds` behind the first steps."""
    _start: float = 0.0
    _waited: float = 0.0
    _running: bool = False

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()
        self._running = True

    def wait(self, seconds: float) -> None:
        """Take the time that a batch took, which ends now: it counts for the step that ends next.

        The trainer asks for the next batch before it hands out the last micro-batch of a step: with several of
        them, within the step, whose clock then stands still.
        """
        self._waited += seconds
        if self._running:
            self._start += seconds

    def stop(self, device: torch.device, num_tokens: int) -> None:
        """End a step of so many tokens; a GPU is waited for, since its kernels run behind."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._add(time.perf_counter() - self._start, num_tokens, self._waited)
        self._waited, self._running = 0.0, False

    def restore(self, seconds: Sequence[float], tokens: Sequence[int], waits: Sequence[float]) -> None:
        """Begin with the steps of a run that goes on."""
        steps = list(zip(seconds, tokens, waits, strict=True))
        self.seconds, self.tokens, self.waits, self._counted_s = [], [], [], [0.0, 0.0]
        for step in steps:
            self._add(*step)

    def _add(self, seconds: float, tokens: int, waited: float) -> None:
        if len(self.seconds) >= WARM_UP_STEPS:
            self._counted_s[0] += waited
            self._counted_s[1] += seconds
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.waits.append(waited)

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        counted = self.seconds[WARM_UP_STEPS:] or self.seconds
        return statistics.median(counted) if counted else 0.0

    @property
    def recent_tokens_per_s(self) -> float:
        """Tokens per second of the last steps together: shown after each step, so it costs no more in a long run."""
        first = max(len(self.seconds) - RECENT_STEPS, WARM_UP_STEPS if len(self.seconds) > WARM_UP_STEPS else 0)
        seconds = sum(self.seconds[first:])
        return sum(self.tokens[first:]) / seconds if seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the median step: where steps differ in length, of the one with the median speed."""
        speeds = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        return statistics.median(speeds[WARM_UP_STEPS:] or speeds) if speeds else 0.0

    @property
    def data_share(self) -> float:
        """Share of the training time, evaluations and logs left out, for which the trainer waited for batches."""
        is_short = len(self.seconds) <= WARM_UP_STEPS
        waited, trained = (sum(self.waits), sum(self.seconds)) if is_short else self._counted_s
        return waited / (waited + trained) if waited else 0.0


class CellCallback(lightning.Callback):
    """Follows one cell; `stopped` tells whether it was asked to end early."""

    def __init__(self, hooks: RunContext, checkpoints: Path, meter: StepTimer) -> None:
        self.hooks = hooks
        self.checkpoints = checkpoints
        self.meter = meter
        self.stopped = False
        self.parallel = ParallelCosts()
        self.execution = ExecutedCost(())
        """What the MoE layers executed in all steps of training."""
        self.final: Evaluation | None = None
        """The test split, evaluated after the last step; None before."""
        self.validation: Evaluation | None = None
        """The validation split, evaluated last: at the end, after the last step; None before."""

    def setup(self, trainer: Any, pl_module: lightning.LightningModule, stage: str) -> None:
        """Prepare to count what the module's layers execute; a checkpoint is loaded after this."""
        assert isinstance(pl_module, CellModule)
        self.execution = ExecutedCost(pl_module.layers)

    def state_dict(self) -> dict[str, Any]:
        """Keep the seconds of the steps and what they executed: a resumed run's means are those of all its steps."""
        timed = {"seconds": self.meter.seconds, "tokens": self.meter.tokens, "waits": self.meter.waits}
        timed |= {"parallel": self.parallel.sums, "num_timed": self.parallel.num_steps}
        return timed | {"execution": self.execution.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seconds of the steps before the checkpoint, and what they executed."""
        self.execution.load_state(state_dict["execution"])
        self.meter.restore(state_dict["seconds"], state_dict["tokens"], state_dict["waits"])
        self.parallel = ParallelCosts(sums=state_dict["parallel"], num_steps=state_dict["num_timed"])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of the step, with its first micro-batch."""
        assert isinstance(pl_module, CellModule)
        if batch_idx % pl_module.config.train.accumulate == 0:
            pl_module.mesh.traffic.reset(timed=self._is_logged(pl_module.config.train, trainer.global_step + 1))
            self.meter.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind the last micro-batch: stop the clock, then log, evaluate and save as the configuration says."""
        assert isinstance(pl_module, CellModule)
        if (batch_idx + 1) % pl_module.config.train.accumulate == 0:
            self._end_of_step(trainer, pl_module)

    def _end_of_step(self, trainer: Any, module: CellModule) -> None:
        module.update_routers()
        train, step = module.config.train, trainer.global_step
        num_tokens = module.task.count_positions(train.batch_size, module.config.seed, step - 1)
        self.meter.stop(module.device, num_tokens)
        for records in module.records:
            self.execution.add(records)
        last = step == train.steps
        if self._is_logged(train, step):
            self._log(module, step)
        if step % module.config.parallel.check_every == 0 or last:
            check_replicas(module, module.mesh)
        if step % train.eval_every == 0 or last:
            self.validation = module.evaluate("validation")
            self._record(step, self.validation)
        if last:
            self.final = module.evaluate_trained()
            self.hooks.recorder.append(step, {f"test/{name}": value for name, value in self.final.metrics.items()})
        self.stopped = not last and module.stop_agreed
        if step % train.checkpoint_every == 0 or last or self.stopped:
            self.execution.share(module.mesh)  # every process keeps the sums of all in its checkpoint
            self.hooks.recorder.flush()  # the journal is on disk before a checkpoint claims its steps
            trainer.save_checkpoint(checkpoint_path(self.checkpoints, step))
        trainer.should_stop = trainer.should_stop or self.stopped
        self.hooks.progress({"step": step, "loss": module.last_loss, "tokens_per_s": self.meter.recent_tokens_per_s})

    @staticmethod
    def _is_logged(train: TrainConfig, step: int) -> bool:
        return step % train.log_every == 0 or step in (1, train.steps)

    def _log(self, module: CellModule, step: int) -> None:
        metrics = average_objectives(module.objectives, module.mesh.world) | {
            "train/learning_rate": module.last_rate,
            "train/grad_norm": module.last_grad_norm,
            "train/tokens_per_s": self.meter.tokens[-1] / self.meter.seconds[-1],
            "time/data_share": self.meter.data_share,
        }
        metrics |= {f"train/{name}": value for name, value in load_metrics(module).items()}
        found = parallel_metrics(
            module.layers,
            module.records,
            module.mesh,
            step_s=self.meter.seconds[-1],
            num_tokens=self.meter.tokens[-1],
            element_size=2 if module.config.train.precision == "bf16" else 4,
        )
        self.parallel.add(step, found)
        self.hooks.recorder.append(step, metrics | found)

    def _record(self, step: int, evaluation: Evaluation) -> None:
        self.hooks.recorder.append(step, {f"eval/{name}": value for name, value in evaluation.metrics.items()})
        if evaluation.load_by_layer:
            self.hooks.recorder.record_load(step, evaluation.load_by_layer)
