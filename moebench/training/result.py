"""The result of one run: what the trainer hands to the store and the store to the analysis."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One cell after training; a failed or stopped run is a result too and says why in `error`."""

    id: str
    arm: str
    seed: int
    status: str  # "done" | "failed" | "stopped"
    error: str | None  # one line, when failed
    step: int  # optimizer steps completed
    metrics: dict[str, float]  # final; empty when failed early
    cost: dict[str, float]
    """active_params, total_params, train_passes, train_tokens; flops_per_token (forward) and experts_per_token as
    planned; both with the prefixes train_ and eval_ as executed: mean over all steps of training, and on the test
    split."""
    throughput: dict[str, float]  # tokens_per_s (median inside the step), step_s, train_s, total_s, data_share
    data_digest: str
    eval_digest: str  # of the evaluation set and the metric's definition: arms must agree
    marks: tuple[str, ...]  # such as "non-causal"
    config: dict[str, Any]  # resolved

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"marks": list(self.marks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunResult":
        """Rebuild a result from `to_dict`."""
        return cls(**{**values, "marks": tuple(values["marks"])})
