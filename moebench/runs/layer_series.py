"""The series of each MoE layer over the logged steps of a run: loads of its experts, drops, logits, executed cost.

`layers.jsonl` has a line for each logged training step, which `RunRecorder` writes. It holds what was counted; shares,
quantiles and MaxVio are computed from it. It imports no torch, so that displays and the tracker can read it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import iter_plain_lines
from moebench.stored_values import require_count

DEAD_SHARE = 0.01
"""An expert with less than this share of an even load is dead, as in `routing.metrics`."""
MAX_LINE_BYTES = 64 * 2**20
MAX_LAYERS, MAX_EXPERTS, MAX_NAME = 1024, 65_536, 100
"""Larger tables are refused."""
MAX_POINTS = 512
"""Steps that `read_thinned_series` keeps, at least half of it where there are more."""
_DIGITS = 7
"""Significant digits of measured numbers in the file."""
_COUNTS = ("tokens", "dropped", "rerouted", "unserved")
_NUMBERS = ("experts_per_token", "flops_per_token")
_OPTIONAL = ("entropy", "logit_max", "logit_std")


@dataclass(frozen=True, kw_only=True)
class LayerValues:
    """What one MoE layer did in one training step, over all processes and micro-batches, without padding."""

    load: tuple[int, ...]
    """Assignments of each expert before capacity."""
    tokens: int
    dropped: int
    """Assignments that no expert computed, those of tokens that passed on unchanged included."""
    rerouted: int
    """Assignments computed by another expert than the router chose."""
    unserved: int
    """Tokens that no expert computed."""
    experts_per_token: float
    """Rows that experts computed per position."""
    flops_per_token: float
    """Forward FLOPs of the layer per position, as executed: router, experts, shared experts."""
    entropy: float | None = None
    """Mean over tokens of the entropy of the softmax of the logits, over ln E: 1 undecided, 0 certain."""
    logit_max: float | None = None
    """Largest router logit."""
    logit_std: float | None = None
    """Standard deviation of the logits over tokens and experts."""

    @property
    def assignments(self) -> int:
        """Assignments before capacity."""
        return sum(self.load)

    @property
    def max_violation(self) -> float:
        """Largest load over the mean load, minus 1: 0 when even."""
        return max(self.load) * len(self.load) / self.assignments - 1 if self.assignments else 0.0

    @property
    def dead_experts(self) -> int:
        """Experts with less than 1 % of an even load."""
        even = self.assignments / len(self.load)
        return sum(count < DEAD_SHARE * even for count in self.load) if even else len(self.load)

    @property
    def drop_rate(self) -> float:
        """Share of assignments that no expert computed."""
        return self.dropped / max(self.assignments, 1)

    @property
    def unserved_rate(self) -> float:
        """Share of tokens that no expert computed."""
        return self.unserved / max(self.tokens, 1)

    def load_quantile(self, share: float) -> float:
        """Return a quantile of the loads over experts, interpolated linearly, as a multiple of an even load."""
        loads, position = sorted(self.load), share * (len(self.load) - 1)
        low = math.floor(position)
        high = min(low + 1, len(loads) - 1)
        value = loads[low] + (position - low) * (loads[high] - loads[low])
        return value * len(loads) / self.assignments if self.assignments else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerPoint:
    """All MoE layers at one logged step."""

    step: int
    layers: Mapping[str, LayerValues]
    """By name, from the input on."""
    end: int = 0
    """Offset of the byte after its line."""


def format_layer_line(step: int, layers: Mapping[str, LayerValues]) -> bytes:
    """Return the line of a step, without its end."""
    values = {name: {key: _to_json(value) for key, value in vars(layer).items()} for name, layer in layers.items()}
    return json.dumps({"step": step, "layers": values}, allow_nan=False, separators=(",", ":")).encode()


def iter_layer_series(path: Path, offset: int = 0) -> Iterator[LayerPoint]:
    """Yield the points from byte `offset` on; a missing file has none, and an incomplete last line is left out.

    One line at a time is in memory. Raises UsageError with file and place for damage.
    """
    end = offset
    try:
        for line in iter_plain_lines(path, offset, MAX_LINE_BYTES):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield parse_layer_line(line, end)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(
            f"{path}, line that ends at byte {end}: not the series of the layers of a run ({error}); restore the file,"
            " or remove the run (`moebench rm`) and train it again"
        ) from error


def read_layer_series(path: Path, offset: int = 0) -> tuple[list[LayerPoint], int]:
    """Return the points from byte `offset` on, and the offset to continue from; raise UsageError for damage."""
    points = list(iter_layer_series(path, offset))
    return points, points[-1].end if points else offset


def read_thinned_series(path: Path, max_points: int = MAX_POINTS) -> list[LayerPoint]:
    """Return at most `max_points` points of a file of any length, evenly spaced, and the last one."""
    kept: list[LayerPoint] = []
    stride, last = 1, None
    for number, last in enumerate(iter_layer_series(path)):
        if number % stride == 0:
            kept.append(last)
        if len(kept) >= max_points:
            kept, stride = kept[::2], 2 * stride
    if last is not None and kept[-1].step != last.step:
        kept.append(last)
    return kept


def parse_layer_line(line: bytes, end: int = 0) -> LayerPoint:
    """Return the point of a line; raise ValueError unless it is one."""
    try:
        raw = json.loads(line)
        layers = raw["layers"]
        if not isinstance(layers, dict) or len(layers) > MAX_LAYERS:
            raise ValueError(f"it has no table of at most {MAX_LAYERS} layers")
        parsed = {_check_name(name): _parse_layer(values) for name, values in layers.items()}
        return LayerPoint(step=require_count(raw["step"]), layers=parsed, end=end)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:100]) from error


def list_layers(points: Sequence[LayerPoint]) -> list[str]:
    """Return the names of all layers, in the order in which they occur."""
    return list(dict.fromkeys(name for point in points for name in point.layers))


def select_layers(points: Sequence[LayerPoint], max_layers: int) -> list[str]:
    """Return at most `max_layers` names, in their order: the most uneven layer at the end, and others evenly spaced."""
    names = list_layers(points)
    if len(names) <= max_layers:
        return names
    last = points[-1].layers
    worst = max(names, key=lambda name: last[name].max_violation if name in last else 0.0)
    others = [name for name in names if name != worst]
    spread = max(max_layers - 2, 1)
    positions = {round(position * (len(others) - 1) / spread) for position in range(max_layers - 1)}
    return [name for name in names if name == worst or others.index(name) in positions]


def _to_json(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"the name of a layer is {name[:40]!r}")
    return name


def _parse_layer(values: Mapping[str, Any]) -> LayerValues:
    load = values["load"]
    if not isinstance(load, list) or not 0 < len(load) <= MAX_EXPERTS:
        raise ValueError(f"a load is not a list of 1 to {MAX_EXPERTS} numbers")
    parsed: dict[str, Any] = {name: require_count(values[name]) for name in _COUNTS}
    parsed |= {name: _check_number(values[name]) for name in _NUMBERS}
    parsed |= {name: None if values[name] is None else _check_number(values[name]) for name in _OPTIONAL}
    return LayerValues(load=tuple(map(require_count, load)), **parsed)


def _check_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"it has {str(value)[:40]!r} in place of a finite number")
    return float(value)
