"""Spikes of the loss and of the gradient norm: the rule that finds them, and the record of those that occurred.

A value is a spike when it lies more than `spike_threshold` robust deviations above the median of the `spike_window`
values before it. The robust deviation is 1.4826 times the median absolute deviation, which is the standard deviation
for normally distributed values, but at least 1 % of the median. Other than with mean and standard deviation, a spike in
the window does not raise the limit for the next one. Until half of the window is filled there are no spikes.

Sources: OLMo-core skips an update when the loss or the gradient norm lies 6 standard deviations from the mean of the
last 128 steps (`SkipStepOptimizer`); PaLM (arXiv:2204.02311, section 5.1) goes back to a checkpoint and leaves out the
batches.
"""

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moebench.schema import TrainConfig
from moebench.tasks.task import Task

NORMAL_CONSISTENCY = 1.4826
"""Standard deviation over median absolute deviation of normally distributed values."""
SMALLEST_DEVIATION = 0.01
"""As a share of the median: values of a converged run differ only by rounding."""
MAX_LISTED_SAMPLES = 64
"""Samples of a batch that a record lists."""


@dataclass(frozen=True, kw_only=True)
class BatchName:
    """What identifies the training batch of a step: `Task.train_batch` makes it from seed and number."""

    seed: int
    number: int
    """Argument `step` of `Task.train_batch`, from 0; another than that of the step after a rewind."""
    noun: str = "samples"
    samples: tuple[int, ...] = ()
    """Indices in the training split, in the order of the batch; empty for a task that generates its data."""

    @classmethod
    def of_task(cls, task: Task, batch_size: int, seed: int, number: int) -> "BatchName":
        """Return the name of a batch."""
        samples = task.list_train_samples(batch_size, seed, number)
        return cls(seed=seed, number=number, noun=task.sample_noun, samples=tuple(samples))

    def __str__(self) -> str:
        """Return the name in words, with the first eight samples."""
        listed = ", ".join(map(str, self.samples[:8])) + (", ..." if len(self.samples) > 8 else "")
        return f"batch {self.number} of seed {self.seed}" + (f" ({self.noun} {listed})" if self.samples else "")


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step whose loss or gradient norm is above its limit."""

    step: int
    """From 1, as in the journal."""
    loss: float
    """Mean task loss over the step and all processes."""
    loss_limit: float
    grad_norm: float
    """Before clipping."""
    grad_norm_limit: float
    batch: BatchName

    @property
    def is_of_loss(self) -> bool:
        """Whether the loss is above its limit; else it is the gradient norm alone."""
        return self.loss > self.loss_limit

    @property
    def metrics(self) -> dict[str, float]:
        """Values for the journal."""
        return {
            "spike/loss": self.loss,
            "spike/loss_limit": self.loss_limit,
            "spike/grad_norm": self.grad_norm,
            "spike/grad_norm_limit": self.grad_norm_limit,
            "spike/batch": float(self.batch.number),
        }

    def to_dict(self, action: str) -> dict[str, Any]:
        """Return the record for the result; `action`: recorded, skipped or rewound."""
        values = asdict(self) | {"action": action}
        batch = values.pop("batch")
        return (
            values
            | {name: batch[name] for name in ("seed", "number", "noun")}
            | {"samples": list(self.batch.samples[:MAX_LISTED_SAMPLES])}
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Spike":
        """Rebuild a spike from `to_dict`."""
        names = ("seed", "number", "noun")
        batch = BatchName(**{name: values[name] for name in names}, samples=tuple(values["samples"]))
        rest = {name: value for name, value in values.items() if name not in (*names, "samples", "action")}
        return cls(**rest, batch=batch)

    def __str__(self) -> str:
        """Return the spike in one line."""
        loss = f"loss {self.loss:.4g} (limit {self.loss_limit:.4g})"
        norm = f"gradient norm {self.grad_norm:.4g} (limit {self.grad_norm_limit:.4g})"
        return f"spike at step {self.step}: {loss}, {norm}, {self.batch}"


@dataclass
class RecentValues:
    """The last values of a quantity, and the limit that they set for the next one."""

    window: int
    threshold: float
    values: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.values = deque(maxlen=self.window)

    def limit(self) -> float:
        """Return the value above which the next one is a spike; infinite until half of the window is filled."""
        if len(self.values) < self.window // 2:
            return float("inf")
        median = statistics.median(self.values)
        deviation = NORMAL_CONSISTENCY * statistics.median(abs(value - median) for value in self.values)
        return median + self.threshold * max(deviation, SMALLEST_DEVIATION * abs(median))


class SpikeGuard:
    """Compares each step with those before it; equal on all processes, which have the same loss and norm."""

    def __init__(self, train: TrainConfig) -> None:
        self.policy = train.spike_policy
        self.losses = RecentValues(train.spike_window, train.spike_threshold)
        self.grad_norms = RecentValues(train.spike_window, train.spike_threshold)
        self.records: list[dict[str, Any]] = []
        """Spikes of the steps so far, as `Spike.to_dict` gives them."""
        self.latest: Spike | None = None
        """The spike of the last step; None if it was none."""

    def check(self, step: int, loss: float, grad_norm: float, name_batch: Callable[[], BatchName]) -> Spike | None:
        """Return the spike of a step, from 1, or None; then add its values to those that later steps are compared with.

        A step is a spike when its loss is above the limit, and under the policy `skip` when its gradient norm is.
        `name_batch` is called for a spike alone.
        """
        limits = self.losses.limit(), self.grad_norms.limit()
        # All values are added, spikes too: after half a window, a level that has risen for good is no spike any more.
        self.losses.values.append(loss)
        self.grad_norms.values.append(grad_norm)
        self.latest = None
        if loss > limits[0] or (self.policy == "skip" and grad_norm > limits[1]):
            self.latest = Spike(
                step=step,
                loss=loss,
                loss_limit=limits[0],
                grad_norm=grad_norm,
                grad_norm_limit=limits[1],
                batch=name_batch(),
            )
        return self.latest

    def record(self, spike: Spike, action: str) -> None:
        """Keep a spike for the result."""
        self.records.append(spike.to_dict(action))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        return {
            "losses": list(self.losses.values),
            "grad_norms": list(self.grad_norms.values),
            "records": self.records,
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Restore the state."""
        self.losses.values.extend(state["losses"])
        self.grad_norms.values.extend(state["grad_norms"])
        self.records = list(state["records"])
