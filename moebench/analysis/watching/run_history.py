"""What a run has recorded so far, read further whenever it is asked for."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from moebench.runs.folder import RunFolder
from moebench.runs.journal import read_journal
from moebench.runs.layer_series import LayerPoint, LayerValues, read_layer_series
from moebench.runs.result import RunResult

MAX_POINTS = 2000
"""Steps that are kept; of more, every second one, so that following a long run takes no more memory."""
SILENT_S = 10.0
"""After so long without anything new, the lock of a run tells whether it is still trained."""
COLLAPSE = "collapse/"


@dataclass
class Series:
    """Values by step; thinned when there are more than `MAX_POINTS`."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, step: int, value: float | None) -> None:
        """Add the value of a step."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > MAX_POINTS:
            del self.steps[1::2], self.values[1::2]

    @property
    def last(self) -> float | None:
        """The newest value."""
        return self.values[-1] if self.values else None


QUANTITIES = ("MaxVio", "dead", "dropped", "entropy", "max logit")
"""Columns of the view, by importance."""


def list_quantities(layer: LayerValues) -> Mapping[str, float | None]:
    """Return the values of a layer by column."""
    values = layer.max_violation, float(layer.dead_experts), layer.drop_rate, layer.entropy, layer.logit_max
    return dict(zip(QUANTITIES, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class CollapsedLayer:
    """When a layer collapsed, and into which experts."""

    step: int
    expert: int
    """The busiest one."""
    num_experts: float
    """Number of experts that together take nearly all assignments."""
    share: float
    """Share of the assignments that they take."""

    def __str__(self) -> str:
        """Return it in words."""
        others = f" and {self.num_experts - 1:.0f} more" if self.num_experts > 1 else ""
        return f"at step {self.step} into expert {self.expert}{others} ({self.share:.0%})"


class RunHistory:
    """The series of one run; `update` reads what its files have grown by."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.cell = folder.read_cell()
        self.result: RunResult | None = None
        self.loss, self.speed = Series(), Series()
        self.quality: tuple[str, float] | None = None
        """The metric of the last evaluation that comes first, and its value."""
        self.layers: dict[str, dict[str, Series]] = {}
        """Layer -> column -> values."""
        self.num_experts: dict[str, int] = {}
        self.collapses: dict[str, CollapsedLayer] = {}
        """Layers that are collapsed."""
        self._journal_offset = self._layers_offset = 0
        self._grown_at = time.monotonic()

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        train = self.cell["config"].get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else 0

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return self.loss.steps[-1] if self.loss.steps else 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: there is a result, or no process trains the run."""
        return self.result is not None or (time.monotonic() - self._grown_at > SILENT_S and not self.is_being_trained())

    def is_being_trained(self) -> bool:
        """Return whether a process trains the run; it is taken to where this cannot be known."""
        return self.folder.is_being_trained(if_unreadable=True)

    def update(self) -> bool:
        """Read what is new; return whether anything is. Raises UsageError for damage."""
        self._forget_repeated_steps()
        points, journal_offset = read_journal(self.folder.journal, self._journal_offset)
        for point in points:
            self._add_metrics(point.step, point.metrics)
        layer_points, layers_offset = read_layer_series(self.folder.layers, self._layers_offset)
        for layer_point in layer_points:
            self._add_layers(layer_point)
        self._journal_offset, self._layers_offset = journal_offset, layers_offset
        has_grown = bool(points or layer_points)
        if has_grown:
            self._grown_at = time.monotonic()
        had_result = self.result is not None
        self.result = self.folder.read_result()
        return has_grown or had_result != (self.result is not None)

    def _forget_repeated_steps(self) -> None:
        """Begin again where a file is shorter than before: the run went back to a checkpoint."""
        files = (self.folder.journal, self._journal_offset), (self.folder.layers, self._layers_offset)
        if any(offset > (path.stat().st_size if path.exists() else 0) for path, offset in files):
            self._journal_offset = self._layers_offset = 0
            self.loss, self.speed, self.quality = Series(), Series(), None
            self.layers, self.collapses = {}, {}

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss/task" in metrics:
            self.loss.add(step, metrics["loss/task"])
            self.speed.add(step, metrics.get("train/tokens_per_s"))
        quality = [(name.removeprefix("eval/"), value) for name, value in metrics.items() if name.startswith("eval/")]
        self.quality = quality[0] if quality else self.quality
        for name, value in metrics.items():
            layer, _, part = name.removeprefix(COLLAPSE).rpartition("/")
            if name.startswith(COLLAPSE) and part == "expert" and math.isfinite(value):
                numbers = {key: metrics.get(f"{COLLAPSE}{layer}/{key}", 1.0) for key in ("num_experts", "share")}
                self.collapses[layer] = CollapsedLayer(step=step, expert=int(value), **numbers)
            elif name.startswith(COLLAPSE) and part == "recovered":
                self.collapses.pop(layer, None)

    def _add_layers(self, point: LayerPoint) -> None:
        for name, layer in point.layers.items():
            series = self.layers.setdefault(name, {quantity: Series() for quantity in QUANTITIES})
            self.num_experts[name] = len(layer.load)
            for quantity, value in list_quantities(layer).items():
                series[quantity].add(point.step, value)
