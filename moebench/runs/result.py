"""The result of one run: what the trainer hands to the store and the store to the analysis."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

DIVERGED = "diverged"
"""The `fault` of a run whose loss or gradient was not a finite number: an outcome of its arm, not of the machine."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One cell after training; a failed or stopped run is a result too and says why in `error`."""

    id: str
    arm: str
    seed: int
    status: str  # "done" | "failed" | "stopped"
    error: str | None  # one line, when failed
    step: int  # optimizer steps completed
    metrics: dict[str, float]  # final, on the test split; empty when failed early
    cost: dict[str, float]
    """active_params, total_params, train_passes, train_tokens; flops_per_token (forward) and experts_per_token as
    planned; both with the prefixes train_ and eval_ as executed: mean over all steps of training, and on the test
    split."""
    throughput: dict[str, float]  # tokens_per_s (median inside the step), step_s, train_s, total_s, data_share
    data_digest: str
    eval_digest: str  # of the evaluation set and the metric's definition: arms must agree
    marks: tuple[str, ...]  # such as "non-causal"
    config: dict[str, Any]  # resolved
    validation: dict[str, float] = field(default_factory=dict)  # final, on the validation split
    fault: str = ""  # of a failure, its kind: Fault.DIVERGED, or one of `judgement`

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"marks": list(self.marks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunResult":
        """Rebuild a result from `to_dict`."""
        return cls(**{**values, "marks": tuple(values["marks"])})
