"""Results of a grid of four arms, and the text of their comparison, for tests of its tables."""

from io import StringIO

from rich.console import Console
from support.comparison_runs import DENSE, JITTER

from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.values import Comparison
from moebench.runs.result import RunResult

LOAD = {
    "max_violation": 0.8,
    "cv": 0.4,
    "entropy": 0.97,
    "dead_experts": 0.5,
    "drop_rate": 0.012,
    "train_drop_rate": 0.02,
    "unserved": 0.0,
}


def make_costly_result(arm: str, seed: int, value: float) -> RunResult:
    """Return a finished run with load metrics, costs and speeds of all kinds."""
    load = {} if arm == "dense" else {f"load/{name}": amount for name, amount in LOAD.items()}
    return RunResult(
        id=f"{arm[:3]}{seed}",
        arm=arm,
        seed=seed,
        status="done",
        error=None,
        step=600,
        metrics={"bits_per_byte": value, **load},
        cost={
            "active_params": 1.234e6,
            "total_params": 4.567e6 if load else 1.234e6,
            "flops_per_token": 2.469e6,
            "train_flops_per_token": 2.45e6 if load else 2.469e6,
            "eval_flops_per_token": 2.469e6,
            "experts_per_token": 1.0 if load else 0.0,
            "train_experts_per_token": 0.98 if load else 0.0,
            "eval_experts_per_token": 1.0 if load else 0.0,
            "train_tokens": 4.9e6,
        },
        throughput={"tokens_per_s": 14_000.0 if load else 20_000.0},
        data_digest="data",
        eval_digest="eval",
        marks=("non-causal",) if arm == "expert_choice" else (),
        config={},
    )


def grid(num_seeds: int = 5) -> list[RunResult]:
    """Return results of a baseline, two better arms and one that is equal, seeds outermost."""
    return [
        make_costly_result(arm, seed, DENSE[seed] + offset + (JITTER[seed] if offset else 0))
        for seed in range(num_seeds)
        for arm, offset in {
            "dense": 0,
            "switch": -0.01,
            "sigmoid_bias_free": 0.0005,
            "expert_choice": -0.02,
        }.items()
    ]


def render(comparison: Comparison, width: int) -> str:
    """Return the report as a terminal of this width shows it."""
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(build_report(comparison).to_rich())
    return out.getvalue()
