"""The result of a finished run: its metrics, what it cost, and how fast it was."""

import time
from dataclasses import asdict

from moebench.compatibility import list_marks
from moebench.config import to_plain
from moebench.runs.result import RunResult
from moebench.training.backward_cost import measure_trained_part
from moebench.training.batches import count_train_tokens
from moebench.training.callback import CellCallback
from moebench.training.model import compute_model_cost
from moebench.training.module import CellModule
from moebench.training.utilization import compute_mfu


def build_result(module: CellModule, callback: CellCallback, *, cell_id: str, arm: str, start_s: float) -> RunResult:
    """Build the result of a trained and evaluated cell; `start_s`: `time.perf_counter()` at the start of the run."""
    assert callback.final is not None
    assert callback.validation is not None
    config, task, timer = module.config, module.task, callback.timer
    drop_rates = {f"load/train_{name}": value for name, value in callback.executed_cost.drop_rates().items()}
    throughput = {
        "tokens_per_s": timer.tokens_per_s,
        "step_s": timer.step_s,
        "train_s": sum(timer.durations_s),
        "data_share": timer.data_share,
    }
    cost = _compute_cost(module, callback)
    if callback.peak_flops:
        peak_flops = callback.peak_flops * module.mesh.size
        throughput["mfu"] = compute_mfu(cost["train_flops_per_token"], timer.tokens_per_s, peak_flops)
    return RunResult(
        id=cell_id,
        arm=arm,
        seed=config.seed,
        status="done",
        error=None,
        step=config.train.steps,
        metrics=callback.final.metrics | drop_rates,
        cost=cost,
        throughput=throughput | callback.parallel_costs.means() | {"total_s": time.perf_counter() - start_s},
        data_digest=task.digest,
        eval_digest=task.eval_digest,
        marks=list_marks(config),
        config=to_plain(config),
        validation=callback.validation.metrics | drop_rates,
        spikes=module.source.rewinds.to_records() + module.spike_guard.records,
    )


def _compute_cost(module: CellModule, callback: CellCallback) -> dict[str, float]:
    """Compute the planned cost of a cell, and its executed cost per token in training and on the test split.

    The executed cost of a dense model is the planned one. Training counts every pass over a token.
    """
    assert callback.final is not None
    task, model = module.task, module.model
    planned = compute_model_cost(model, task.sequence_length, task.decoder_length)
    trained, evaluated = callback.executed_cost.metrics(model, task), callback.final.load
    cost = {name: float(value) for name, value in asdict(planned).items()}
    for quantity in ("flops_per_token", "experts_per_token"):
        name = f"load/{quantity}"
        cost[f"train_{quantity}"] = planned.train_passes * trained.get(name, cost[quantity])
        cost[f"eval_{quantity}"] = evaluated.get(name, cost[quantity])
    cost["train_flops_per_token"] += planned.training_only_flops
    if module.config.train.trainable != "all":
        part = measure_trained_part(model, module.config.train, task.sequence_length)
        cost |= {"train_factor": part.factor, "trained_share": part.share}
    cost |= callback.budget.to_cost() if callback.budget else {}
    return cost | {"train_tokens": float(count_train_tokens(module.config, task, module.source.rewinds))}
