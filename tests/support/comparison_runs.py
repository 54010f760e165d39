"""Results with given metrics and costs, for tests of comparisons."""

from dataclasses import replace

from moebench.analysis.compare.values import ArmSummary, Comparison
from moebench.runs.result import RunResult

DENSE = (2.00, 2.02, 1.98, 2.01, 1.99)
"""Metric of the dense arm for five seeds."""
JITTER = (0.001, -0.001, 0.002, -0.002, 0.0)
"""Added to the difference of every other arm, seed by seed: mean 0, SD 0.0015811."""


def make_cost(flops: float = 2e6, evaluated: float | None = None, **changes: float) -> dict[str, float]:
    """Return the cost of a run with these executed FLOPs per token in training and, if other, in evaluation."""
    executed = {"train_flops_per_token": flops, "eval_flops_per_token": flops if evaluated is None else evaluated}
    planned = {"active_params": 1e6, "total_params": 4e6, "flops_per_token": 2e6, "train_tokens": 8e5}
    return planned | executed | changes


COST = make_cost()


def make_result(arm: str, seed: int, value: float, **changes: object) -> RunResult:
    """Return a finished run with this metric on the test split."""
    result = RunResult(
        id=f"{arm}-{seed}",
        arm=arm,
        seed=seed,
        status="done",
        error=None,
        step=100,
        metrics={"bits_per_byte": value, "bits_per_byte/code": value - 0.5, "bits_per_byte/law": value + 0.5},
        cost=dict(COST),
        throughput={"tokens_per_s": 1000.0 + seed, "step_s": 0.1, "train_s": 10.0, "total_s": 12.0},
        data_digest="data",
        eval_digest="eval",
        marks=(),
        config={},
    )
    return replace(result, **changes)  # type: ignore[arg-type]


def make_results(offsets: dict[str, float], num_seeds: int = 5) -> list[RunResult]:
    """Return results with seeds outermost; the arm with offset 0 is the baseline and has no jitter."""
    return [
        make_result(arm, seed, DENSE[seed] + offset + (JITTER[seed] if offset else 0))
        for seed in range(num_seeds)
        for arm, offset in offsets.items()
    ]


def list_cells(results: list[RunResult]) -> list[tuple[str, int, str]]:
    """Return arm, seed and id of each result: the expected cells of a comparison."""
    return [(result.arm, result.seed, result.id) for result in results]


def summary_of(comparison: Comparison, arm: str) -> ArmSummary:
    """Return the summary of an arm."""
    return next(summary for summary in comparison.arms if summary.arm == arm)


def fail_seeds(results: list[RunResult], arm: str, seeds: tuple[int, ...], fault: str) -> list[RunResult]:
    """Return the results with these seeds of an arm failed by this fault."""
    lost = {"status": "failed", "error": f"it {fault}", "fault": fault, "metrics": {}}
    return [replace(r, **lost) if r.arm == arm and r.seed in seeds else r for r in results]


def with_own_jitter(results: list[RunResult]) -> list[RunResult]:
    """Return the results with a separate jitter for each arm, so that the differences of any pair vary."""
    arms = list(dict.fromkeys(result.arm for result in results))
    moves = {(r.arm, r.seed): 0.0005 * ((r.seed + 1) * (arms.index(r.arm) + 1) % 5 - 2) for r in results}
    return [replace(r, metrics={"bits_per_byte": r.metrics["bits_per_byte"] + moves[r.arm, r.seed]}) for r in results]
