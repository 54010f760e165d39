"""The result of one run, written by the trainer and read by the runner and the analysis."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import NoneType
from typing import Any

from moebench.runs.checked_json import Types, require_numbers, require_types


class Fault(StrEnum):
    """The kind of failure, as stored in `result.json`."""

    PROCESS_ERROR = "own"
    """An exception in one process."""
    COMMON_ERROR = "common"
    """An exception that every process raises by design, such as an invalid configuration."""
    DIVERGED = "diverged"
    """A value was not finite, or a spike ended the run: an outcome of the arm, not of the machine."""
    TIMEOUT = "waited"
    """A collective timed out: another process did not take part."""
    DISCONNECTED = "lost"
    """The connection to another process broke."""
    EXTERNAL = "outside"
    """The process was killed, hung or became unreachable; it raised no exception."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of one cell; a failed or stopped run has one too, with the reason in `error`."""

    id: str
    arm: str
    seed: int
    status: str
    """`done`, `failed` or `stopped`."""
    error: str | None
    """One line if the run failed."""
    step: int
    """Optimizer steps completed."""
    metrics: dict[str, float]
    """Final metrics on the test split; empty if the run failed."""
    cost: dict[str, float]
    """active_params, total_params, train_passes, train_tokens; flops_per_token (forward) and experts_per_token as
    planned; both with the prefixes train_ and eval_ as executed: mean over all steps of training, and on the test
    split. Where train.trainable leaves parameters as they are: train_factor (FLOPs of forward and backward pass over
    those of the forward pass; elsewhere 3) and trained_share (of the parameters)."""
    throughput: dict[str, float]
    """tokens_per_s (median inside the step), mfu where known, step_s, train_s, total_s, data_share."""
    data_digest: str
    eval_digest: str
    """Digest of the evaluation set and of the metric's definition: arms must agree."""
    marks: tuple[str, ...]
    """Warnings shown beside the arm, such as `non-causal`."""
    config: dict[str, Any]
    """The resolved configuration."""
    validation: dict[str, float] = field(default_factory=dict)
    """Final metrics on the validation split."""
    fault: str = ""
    """A `Fault` if the run failed."""
    records: dict[str, str] = field(default_factory=dict)
    """File of the run folder (journal, loads, labels) -> its SHA-256 when the run was done."""
    version: str = ""
    """The moebench that trained it; empty: not recorded."""
    spikes: list[dict[str, Any]] = field(default_factory=list)
    """Loss spikes of a finished run: step, loss, loss_limit, grad_norm, grad_norm_limit; seed, number and samples of
    the batch; action: recorded, skipped (no update) or rewound."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"marks": list(self.marks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunResult":
        """Rebuild a result from `to_dict`; raise ValueError or TypeError where it is damaged."""
        require_types(values, TYPES, optional=("validation", "fault", "records", "version"))
        for key in NUMBERS:
            if key in values:
                require_numbers(values, key)
        if not all(isinstance(text, str) for text in (*values["marks"], *values.get("records", {}).values())):
            raise ValueError("'marks' and 'records' must hold texts")
        if values["status"] not in STATUSES:
            raise ValueError(f"'status' is '{values['status']}', expected {', '.join(STATUSES)}")
        return cls(**{**values, "marks": tuple(values["marks"])})


STATUSES = ("done", "failed", "stopped")
NUMBERS = ("metrics", "cost", "throughput", "validation")
"""Fields that map names to numbers."""
TYPES: dict[str, Types] = {
    "id": str,
    "arm": str,
    "seed": int,
    "status": str,
    "error": (str, NoneType),
    "step": int,
    **dict.fromkeys((*NUMBERS, "config", "records"), dict),
    "data_digest": str,
    "eval_digest": str,
    "marks": (list, tuple),
    "fault": str,
    "version": str,
}
