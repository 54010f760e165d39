"""Training one cell from its configuration to its result, in this process; resumes at the newest good checkpoint."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import lightning
import torch

from moebench.compatibility import list_marks
from moebench.config import to_plain
from moebench.parallel.checkpoint import (
    VerifiedCheckpointIO,
    find_newest_valid,
    keep_newest_checkpoints,
    parse_step,
    remove_checkpoints_after,
)
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.parallel.process_info import SINGLE_PROCESS, ProcessInfo
from moebench.parallel.strategy import build_strategy
from moebench.runs.result import RunResult
from moebench.schema import CellConfig, TrainConfig
from moebench.tasks.task import Task
from moebench.training.batches import StepBatches, train_tokens
from moebench.training.callback import CellCallback, RunContext
from moebench.training.label_tables import label_tables_to_json
from moebench.training.model import Model, initialised_model, model_cost
from moebench.training.module import CellModule
from moebench.training.step_timer import StepTimer


def train_cell(
    config: CellConfig,
    task: Task,
    checkpoints: Path,
    hooks: RunContext,
    *,
    cell_id: str,
    arm: str,
    mesh: Mesh = SINGLE_PROCESS_MESH,
) -> RunResult | None:
    """Train (or go on training) one cell and evaluate it on both splits; all processes of a mesh call it.

    Returns None when it was asked to stop; what was done lies in the checkpoint. Raises NonFiniteError before an
    update with a loss or gradient that is not a number.
    """
    started = time.perf_counter()
    resume = _last_good(checkpoints, hooks, mesh)
    first_step = parse_step(resume) if resume else 0
    model = initialised_model(config, task, mesh)
    timer = StepTimer()
    module = CellModule(config, model, task, mesh, hooks.should_stop)
    callback = CellCallback(hooks, checkpoints, meter)
    fit(build_trainer(config, [callback], mesh), module, timer, resume, first_step)
    if callback.stopped:
        return None
    # Killed between the last checkpoint and the result: the journal has the evaluations, the result does not.
    # (Lightning has taken the module back to the host.)
    validation = callback.validation or module.to(mesh.device).evaluate("validation")
    final = callback.final or module.to(mesh.device).evaluate_trained()
    if final.labels:
        hooks.recorder.record_labels(label_tables_to_json(config.train.steps, final.labels))
    if mesh.is_first:
        keep_newest_checkpoints(1, checkpoints)  # there is nothing left to fall back from
    executed = callback.execution
    losses = {f"load/train_{name}": value for name, value in executed.losses().items()}
    speed = {"tokens_per_s": meter.tokens_per_s, "step_s": meter.step_s, "train_s": sum(meter.seconds)}
    speed["data_share"] = meter.data_share
    return RunResult(
        id=cell_id,
        arm=arm,
        seed=config.seed,
        status="done",
        error=None,
        step=config.train.steps,
        metrics=final.metrics | losses,
        cost=_cost(config, model, task, executed.metrics(model, task), final.load),
        throughput=speed | callback.parallel.means() | {"total_s": time.perf_counter() - started},
        data_digest=task.digest,
        eval_digest=task.eval_digest,
        marks=list_marks(config),
        config=to_plain(config),
        validation=validation.metrics | losses,
    )


def _cost(
    config: CellConfig, model: Model, task: Task, trained: Mapping[str, float], evaluated: Mapping[str, float]
) -> dict[str, float]:
    """Return what a cell cost: as planned, and as executed per token in training and on the test split.

    `trained`, `evaluated`: what the MoE layers executed (see `ExecutedCost.metrics`); a dense model has none, so its
    executed cost is the planned one. Training counts each pass that it makes over a token.
    """
    planned = model_cost(model, task.sequence_length, task.decoder_length)
    cost = {name: float(value) for name, value in asdict(planned).items()}
    for quantity in ("flops_per_token", "experts_per_token"):
        name = f"load/{quantity}"
        cost[f"train_{quantity}"] = planned.train_passes * trained.get(name, cost[quantity])
        cost[f"eval_{quantity}"] = evaluated.get(name, cost[quantity])
    cost["train_flops_per_token"] += planned.training_only_flops
    return cost | {"train_tokens": float(train_tokens(config, task))}


def _last_good(checkpoints: Path, hooks: RunContext, mesh: Mesh) -> Path | None:
    """Return the checkpoint to go on from, the same on all processes, and clear away what came after it."""
    resume, damaged = find_newest_valid(checkpoints, mesh)
    if mesh.is_first:
        for line in damaged:
            print(line, flush=True)
        first_step = parse_step(resume) if resume else 0
        remove_checkpoints_after(first_step, checkpoints)
        hooks.recorder.truncate_after(first_step)
    mesh.barrier()
    return resume


def build_trainer(
    config: CellConfig, callbacks: Sequence[lightning.Callback], mesh: Mesh = SINGLE_PROCESS_MESH
) -> lightning.Trainer:
    """Return the trainer of a cell; all that happens between steps is in the callbacks."""
    strategy = build_strategy(mesh, VerifiedCheckpointIO(mesh))
    on_gpu = mesh.device.type == "cuda"
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[mesh.device.index or 0]
        if on_gpu and not mesh.process_info.has_group
        else mesh.process_info.local_world_size,
        num_nodes=mesh.process_info.num_nodes,
        strategy=strategy,
        precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
        accumulate_grad_batches=config.train.accumulate,
        max_steps=config.train.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )


def fit(
    trainer: lightning.Trainer, module: CellModule, meter: StepTimer, resume: Path | None = None, first_step: int = 0
) -> None:
    """Train a cell's module from a step on, with the batches of its task; the meter hears how long they take."""
    batches = StepBatches(module.config, module.task, first_step, module.mesh, meter.wait)
    with warnings.catch_warnings():
        # The batches begin at the resumed step by themselves: nothing is replayed, the state needs no loader.
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
        trainer.fit(module, batches, ckpt_path=resume)


def select_device(train: TrainConfig, process_info: ProcessInfo = SINGLE_PROCESS) -> torch.device:
    """Return the device of a process: on a node each has a GPU of its own."""
    if train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", process_info.local_rank)
    return torch.device("cpu")
