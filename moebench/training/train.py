"""Training one cell in this process, from its newest valid checkpoint to its result."""

import contextlib
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lightning
import torch

from moebench.parallel.async_checkpoint import AsyncCheckpointIO
from moebench.parallel.checkpoint import (
    VerifiedCheckpointIO,
    find_newest_valid,
    keep_newest_checkpoints,
    remove_checkpoints_after,
)
from moebench.parallel.manifest import Manifest, parse_step
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.parallel.process_info import SINGLE_PROCESS, ProcessInfo
from moebench.parallel.strategy import build_strategy
from moebench.runs.result import RunResult
from moebench.schema import CellConfig, TrainConfig
from moebench.tasks.task import Task
from moebench.training.batches import StepBatches
from moebench.training.callback import CellCallback, RunContext
from moebench.training.compilation import compile_blocks
from moebench.training.divergence import NonFiniteError, SpikeError
from moebench.training.evaluation import Evaluation
from moebench.training.initial_weights.load import LoadedWeights, load_initial_weights
from moebench.training.initial_weights.new_experts import fill_new_experts
from moebench.training.initial_weights.record import describe_loaded, summarise_loaded
from moebench.training.kept_weights import prepare_kept_weights
from moebench.training.label_tables import label_tables_to_json
from moebench.training.model import Model, build_initialised_model
from moebench.training.module import CellModule
from moebench.training.precision import matrix_precision
from moebench.training.result import build_result
from moebench.training.rewinds import MAX_REWINDS, RewindRequest, Rewinds
from moebench.training.step_timer import StepTimer


def train_cell(
    config: CellConfig,
    task: Task,
    context: RunContext,
    *,
    cell_id: str,
    arm: str,
    mesh: Mesh = SINGLE_PROCESS_MESH,
) -> RunResult | None:
    """Train a cell, or resume it, and evaluate it on the validation and the test split.

    All processes of the mesh call it. Returns None when the run was asked to stop; its progress is in the checkpoint.
    Raises NonFiniteError before an update whose loss or gradient is not finite and for a final evaluation that is not,
    and SpikeError where `train.spike_policy` says so.
    """
    start_s = time.perf_counter()
    with matrix_precision(config.train, mesh.device):
        module, callback = _fit_with_rewinds(config, task, context, mesh, cell_id)
    if callback.is_stopped:
        return None
    # A run that was killed between its last checkpoint and its result has no step left that would evaluate it.
    # `to`: Lightning has moved the module back to the host.
    callback.validation = callback.validation or module.to(mesh.device).evaluate("validation")
    callback.final = callback.final or module.to(mesh.device).evaluate_trained()
    _require_finite(callback.validation, callback.final)
    if callback.final.labels:
        context.recorder.record_labels(label_tables_to_json(config.train.steps, callback.final.labels))
    if mesh.is_first:
        try:
            keep_newest_checkpoints(1, context.checkpoints)  # a finished run needs no fallback
        except OSError:
            traceback.print_exc()  # into the log: a checkpoint too many does not make a trained cell a failure
    return build_result(module, callback, cell_id=cell_id, arm=arm, start_s=start_s)


def _fit_with_rewinds(
    config: CellConfig, task: Task, context: RunContext, mesh: Mesh, cell_id: str
) -> tuple[CellModule, CellCallback]:
    """Train to the last step or a stop; after a spike under the policy `rewind`, again from the last checkpoint."""
    rewinds: Rewinds = mesh.broadcast_object(Rewinds.read(context.checkpoints))
    checkpoint_io = AsyncCheckpointIO(mesh) if config.parallel.async_checkpoints else VerifiedCheckpointIO(mesh)
    while True:
        checkpoint = _find_checkpoint(context, cell_id, mesh, config.train)
        first_step = parse_step(checkpoint) if checkpoint else 0
        context.recorder.append_missing(first_step, rewinds.metrics(first_step))
        model, timer = build_initialised_model(config, task, mesh), StepTimer()
        loaded = load_initial_weights(config, model, context.results, mesh)
        if loaded is not None and first_step == 0:
            loaded = replace(loaded, copied_experts=fill_new_experts(config, model, task, mesh))
            _record_loaded(loaded, model, context)
        # Each batch passes the embedding: in training, in evaluations and where a task probes the trained model.
        model.embedding.register_forward_hook(lambda *_: context.report_activity("active"))
        if config.train.compile:
            compile_blocks(model, mesh.device)
        module = CellModule(config, model, task, mesh, context.should_stop, rewinds)
        callback = CellCallback(context, timer, cell_id)
        try:
            with saved_at_the_end(checkpoint_io, context):
                fit(build_trainer(config, [callback], mesh, checkpoint_io), module, timer, checkpoint, first_step)
        except RewindRequest as request:
            rewinds = _add_rewind(rewinds, request, context, mesh, config.train)
        else:
            return module, callback


def _record_loaded(loaded: LoadedWeights, model: Model, context: RunContext) -> None:
    """Record and print what the model has taken from its parent."""
    record = describe_loaded(loaded, {name: value.shape for name, value in model.state_dict().items()})
    context.recorder.record_init(record)
    if context.recorder.folder is not None:
        context.report_note(summarise_loaded(record))


@contextlib.contextmanager
def saved_at_the_end(checkpoint_io: VerifiedCheckpointIO, context: RunContext) -> Iterator[None]:
    """Wait for the last checkpoint after training, and before a rewind to it; raise the error of its write.

    After an error of the training, only a single process waits: others may have failed before they wrote their part.
    """
    try:
        yield
    except RewindRequest:
        checkpoint_io.wait()
        raise
    except BaseException:
        if checkpoint_io.mesh.size == 1:
            try:
                checkpoint_io.wait()
            except Exception:
                traceback.print_exc()  # into the log: the error of the training came first
        raise
    if isinstance(checkpoint_io, AsyncCheckpointIO):
        context.report_activity("saving")
    checkpoint_io.wait()


def _add_rewind(
    rewinds: Rewinds, request: RewindRequest, context: RunContext, mesh: Mesh, train: TrainConfig
) -> Rewinds:
    """Return the rewinds with one more, which is on the disk; raise SpikeError when there are too many."""
    if len(rewinds.entries) >= MAX_REWINDS:
        raise SpikeError(f"{request.spike}; {MAX_REWINDS} rewinds have not helped (train.spike_policy=rewind)")
    rewinds = rewinds.after(request.spike, train.checkpoint_every)
    if mesh.is_first:
        rewinds.write(context.checkpoints)
        print(rewinds.entries[-1], flush=True)
    mesh.barrier()
    return rewinds


def _require_finite(*evaluations: Evaluation) -> None:
    """Raise NonFiniteError for an evaluation of the trained model with values that are not finite."""
    for evaluation in evaluations:
        if evaluation.problem:
            raise NonFiniteError(evaluation.problem)


def _find_checkpoint(context: RunContext, cell_id: str, mesh: Mesh, train: TrainConfig) -> Path | None:
    """Return the checkpoint to resume from, the same on all processes, and remove what was written after it.

    It belongs to the cell, and to a journal that still has the points up to it.
    """

    def check(manifest: Manifest) -> str | None:
        if manifest.cell not in (None, cell_id):
            return f"it is of the cell {manifest.cell}"
        return context.recorder.find_missing(manifest.records)

    checkpoint, damaged = find_newest_valid(context.checkpoints, mesh, check)
    if mesh.is_first:
        for line in damaged:
            context.report_note(line)
        if not checkpoint and damaged:
            context.report_note("training starts at step 0")
        step = parse_step(checkpoint) if checkpoint else 0
        remove_checkpoints_after(step, context.checkpoints)
        missing = prepare_kept_weights(train, context.checkpoints, step)
        if missing:
            context.report_note(missing)
        records = Manifest.read(checkpoint.with_suffix(".json")).records if checkpoint else {}
        context.recorder.rewind(step, records)
    mesh.barrier()
    return checkpoint


def build_trainer(
    config: CellConfig,
    callbacks: Sequence[lightning.Callback],
    mesh: Mesh = SINGLE_PROCESS_MESH,
    checkpoint_io: VerifiedCheckpointIO | None = None,
) -> lightning.Trainer:
    """Build the trainer of a cell; everything between steps is done by the callbacks.

    `checkpoint_io`: what writes checkpoints; None: each save waits until it is on the disk.
    """
    on_gpu = mesh.device.type == "cuda"
    has_group = mesh.process_info.has_group
    trainer = lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[mesh.device.index or 0] if on_gpu and not has_group else mesh.process_info.local_world_size,
        num_nodes=mesh.process_info.num_nodes,
        strategy=build_strategy(mesh, checkpoint_io or VerifiedCheckpointIO(mesh)),
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
    # The caller decides what a signal does; lightning would end the training at SIGTERM, without a checkpoint.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # So there is never a signal to announce, and lightning need not broadcast whether there is one before each batch.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def fit(
    trainer: lightning.Trainer,
    module: CellModule,
    timer: StepTimer,
    checkpoint: Path | None = None,
    first_step: int = 0,
) -> None:
    """Train a module from `first_step` on, which is that of the checkpoint; `timer` adds up the waits for batches."""
    batches = StepBatches(module.source, first_step, timer.add_data_wait)
    with warnings.catch_warnings():
        # `batches` starts at the resumed step: there is nothing to replay, and no loader state to restore.
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
        try:
            trainer.fit(module, batches, ckpt_path=checkpoint)
        finally:
            batches.close()


def select_device(train: TrainConfig, process_info: ProcessInfo = SINGLE_PROCESS) -> torch.device:
    """Return the device of a process: the GPU of its local rank, or the CPU."""
    if train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", process_info.local_rank)
    return torch.device("cpu")
