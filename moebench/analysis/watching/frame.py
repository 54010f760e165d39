"""The view of a run as lines of text that fit a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moebench.analysis.watching.run_history import QUANTITIES, RunHistory, Series
from moebench.reporting.formatting import MISSING, format_count
from moebench.reporting.sparkline import ASCII, BLOCKS, draw_sparkline

MIN_SPARK, MAX_SPARK = 8, 40
VALUE_WIDTH = 6
GAP = 2
LOWEST = {"MaxVio": 0.0, "dead": 0.0, "dropped": 0.0}
"""Lower limit of curves that begin at 0, so that small values look flat."""
MAX_ALARMS = 3


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Where the view is shown."""

    width: int = 80
    height: int | None = None
    """Lines; None: as many as there are."""
    has_blocks: bool = True
    """Whether its encoding has block characters; else everything is ASCII."""

    @property
    def levels(self) -> str:
        """Characters of the curves."""
        return BLOCKS if self.has_blocks else ASCII


def build_frame(history: RunHistory, screen: Screen) -> list[str]:
    """Return the lines of the view: the run, its loss, and for each layer a curve of each quantity and its last value.

    Where quantities do not fit beside each other they follow in blocks; where layers do not fit the screen, those that
    have collapsed and the most uneven ones are shown.
    """
    head = [*_describe_run(history, screen), *_describe_alarms(history)]
    blocks = _split_quantities(history, screen.width)
    shown = _select_layers(history, screen, len(head), len(blocks))
    lines = list(head)
    for quantities in blocks if shown else ():
        lines += ["", *_build_block(history, shown, quantities, screen)]
    if len(shown) < len(history.layers):
        lines.append(f"{len(shown)} of {len(history.layers)} layers: the most uneven ones; --once prints all")
    if not history.layers:
        lines.append("no expert layer has been recorded" if history.step else "nothing has been recorded yet")
    return [_fit(line, screen) for line in lines]


def describe_state(history: RunHistory) -> str:
    """Return done, failed, training or stopped, with the step."""
    steps = f"step {history.step}/{history.num_steps}"
    if history.result is not None:
        return f"{history.result.status}, {steps}"
    return f"{'training' if history.is_being_trained() else 'not running'}, {steps}"


def build_line(history: RunHistory) -> str:
    """Return the newest value of the worst layer of each quantity in one line, for output that is no terminal."""
    columns = {name: [series[name].last for series in history.layers.values()] for name in QUANTITIES}
    parts = [f"step {history.step}/{history.num_steps}", f"loss {_format(history.loss.last)}"]
    for name, values in columns.items():
        finite = [value for value in values if value is not None]
        if finite:
            worst = min(finite) if name == "entropy" else max(finite)
            parts.append(f"{name} {_format_value(name, worst)}")
    if history.collapses:
        parts.append(f"collapsed: layer {', '.join(history.collapses)}")
    return "  ".join(parts)


def _describe_run(history: RunHistory, screen: Screen) -> list[str]:
    cell = history.cell
    loss = f"loss {_format(history.loss.last)} "
    speed = f"{format_count(history.speed.last)} tokens/s" if history.speed.last is not None else ""
    quality = f"validation {history.quality[0].replace('_', ' ')} {history.quality[1]:.4g}" if history.quality else ""
    rest = [text for text in (speed, quality) if text]
    width = max(min(screen.width - len(loss), 2 * MAX_SPARK), 1)
    lines = [f"{cell['arm']}, seed {cell['seed']} ({history.folder.path.name})", describe_state(history)]
    if sum(map(len, lines)) + GAP <= screen.width:
        lines = ["  ".join(lines)]
    lines += [", ".join(rest)] if rest and len(", ".join(rest)) <= screen.width else rest
    return [*lines, loss + draw_sparkline(history.loss.values, width, levels=screen.levels)]


def _describe_alarms(history: RunHistory) -> list[str]:
    newest = sorted(history.collapses.items(), key=lambda item: -item[1].step)
    lines = [f"! layer {layer} collapsed {collapse}" for layer, collapse in newest[:MAX_ALARMS]]
    return lines + ([f"! and {len(newest) - MAX_ALARMS} more layers"] if len(newest) > MAX_ALARMS else [])


def _name_width(history: RunHistory) -> int:
    return min(max([len("layer"), *map(len, history.layers)]), 20)


def _split_quantities(history: RunHistory, width: int) -> list[Sequence[str]]:
    """Return the quantities that stand beside each other, block by block; those that no layer has are left out."""
    present = [
        name
        for name in QUANTITIES
        if any(value is not None for layer in history.layers.values() for value in layer[name].values)
    ]
    per_block = max((width - _name_width(history)) // (GAP + MIN_SPARK + 1 + VALUE_WIDTH), 1)
    num_blocks = -(-len(present) // per_block)
    size = -(-len(present) // num_blocks) if num_blocks else 0
    return [present[start : start + size] for start in range(0, len(present), size or 1)]


def _select_layers(history: RunHistory, screen: Screen, num_head: int, num_blocks: int) -> list[str]:
    names = list(history.layers)
    if screen.height is None or not num_blocks:
        return names
    room = max((screen.height - num_head - 2) // num_blocks - 2, 1)  # an empty line and a header above each block
    if len(names) <= room:
        return names
    worst = sorted(names, key=lambda name: (name not in history.collapses, -(history.layers[name]["MaxVio"].last or 0)))
    return [name for name in names if name in worst[:room]]


def _build_block(
    history: RunHistory, layers: Sequence[str], quantities: Sequence[str], screen: Screen
) -> Iterator[str]:
    name_width = _name_width(history)
    room = (screen.width - name_width) // len(quantities) - GAP - 1 - VALUE_WIDTH
    spark_width = min(max(room, 1), MAX_SPARK)
    gap = " " * GAP
    heads = [f"{name:<{spark_width + 1 + VALUE_WIDTH}}" for name in quantities]
    yield f"{'layer':<{name_width}}{gap}{gap.join(heads)}".rstrip()
    for layer in layers:
        cells = [_build_cell(name, history.layers[layer][name], spark_width, screen) for name in quantities]
        yield f"{layer[:name_width]:<{name_width}}{gap}{gap.join(cells)}"


def _build_cell(name: str, series: Series, spark_width: int, screen: Screen) -> str:
    curve = draw_sparkline(series.values, spark_width, low=LOWEST.get(name), levels=screen.levels)
    return f"{curve:<{spark_width}} {_format_value(name, series.last):>{VALUE_WIDTH}}"


def _format_value(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if name == "dead":
        return f"{value:.0f}"
    return f"{value:.1%}" if name == "dropped" else _format(value)


def _format(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _fit(line: str, screen: Screen) -> str:
    line = line.rstrip()
    if not screen.has_blocks:
        line = line.replace(MISSING, "-")
    if len(line) <= screen.width:
        return line
    mark = "…" if screen.has_blocks else "~"
    return line[: screen.width - 1] + mark
