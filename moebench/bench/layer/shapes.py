"""Shapes to measure: presets by name, and shapes of the command line as T,d,hidden,E,k,activation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moebench.errors import UsageError, build_unknown_error, suggest
from moebench.experts.activation import GATED
from moebench.experts.feed_forward import ffn_flops

Load = Literal["balanced", "router", "zipf"]
LOADS: tuple[str, ...] = get_args(Load)
_FORM = "T,d,hidden,E,k,activation"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a layer and its batch."""

    name: str
    num_tokens: int
    d_model: int
    hidden: int
    """Hidden width of one expert."""
    num_experts: int
    top_k: int
    activation: str
    loads: tuple[str, ...] = ("router",)

    @property
    def num_assignments(self) -> int:
        """Rows that the experts compute without drops: T·k."""
        return self.num_tokens * self.top_k

    @property
    def flops(self) -> int:
        """Forward FLOPs of the active experts over all tokens; the router is not counted."""
        return self.num_tokens * ffn_flops(self.d_model, self.top_k * self.hidden, self.activation)

    @property
    def sizes(self) -> str:
        """All sizes as text."""
        return (
            f"T{self.num_tokens} d{self.d_model} hidden{self.hidden} E{self.num_experts} k{self.top_k}"
            f" {self.activation}"
        )


def _preset(name: str, sizes: tuple[int, ...], activation: str, *loads: str) -> Shape:
    tokens, d_model, hidden, experts, top_k = sizes
    return Shape(
        name=name,
        num_tokens=tokens,
        d_model=d_model,
        hidden=hidden,
        num_experts=experts,
        top_k=top_k,
        activation=activation,
        loads=loads,
    )


PRESETS = (
    _preset("few-wide", (2048, 512, 1024, 8, 2), "swiglu", "router"),
    _preset("middle", (2048, 256, 512, 16, 2), "swiglu", "router"),
    _preset("fine-grained", (2048, 256, 256, 64, 8), "swiglu", "router"),
    _preset("middle-long", (8192, 256, 512, 16, 2), "swiglu", "router"),
    _preset("switch", (2048, 256, 1024, 16, 1), "gelu", *LOADS),
    _preset("switch-many-long", (8192, 256, 1024, 64, 1), "gelu", "balanced"),
    _preset("switch-many", (2048, 256, 1024, 64, 1), "gelu", "balanced"),
    _preset("tiny-batch", (64, 256, 512, 16, 2), "swiglu", "router"),
    _preset("gelu-two", (2048, 256, 512, 16, 2), "gelu", "router"),
)
"""Measured by default."""

GPU_PRESETS = (
    _preset("gpu-fine-grained", (16384, 2048, 1024, 64, 8), "swiglu", "router", "balanced"),
    _preset("gpu-few-wide", (16384, 2048, 4096, 8, 2), "swiglu", "router", "balanced"),
)
"""Measured with --only gpu: hours on a CPU."""


def parse_shape(text: str) -> Shape:
    """Parse T,d,hidden,E,k,activation; raise UsageError naming the part that is wrong."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 6:
        raise UsageError(f"--shape {text}: must be six values {_FORM}, got {len(parts)} (try 2048,256,512,16,2,swiglu)")
    numbers = [_parse_size(text, key, part) for key, part in zip(_FORM.split(","), parts[:5], strict=False)]
    activation = parts[5]
    if activation not in GATED:
        raise build_unknown_error(f"--shape {text}: activation", activation, GATED)
    if numbers[4] > numbers[3]:
        raise UsageError(f"--shape {text}: k must be at most E={numbers[3]}, got {numbers[4]}")
    return _preset(text, tuple(numbers), activation, "router")


def _parse_size(text: str, key: str, part: str) -> int:
    if not part.isdecimal() or int(part) < 1:
        raise UsageError(f"--shape {text}: {key} must be a whole number of at least 1, got '{part}'")
    return int(part)


def choose_shapes(shapes: Sequence[str], only: Sequence[str]) -> tuple[Shape, ...]:
    """Return the given shapes and the named presets, or all default presets when there are neither."""
    named = {shape.name: shape for shape in (*PRESETS, *GPU_PRESETS)}
    chosen = [parse_shape(text) for text in shapes]
    for name in only:
        if name != "gpu" and name not in named:
            allowed = (*named, "gpu")
            raise UsageError(f"--only: '{name}' is unknown.{suggest(name, allowed)} Allowed: {', '.join(allowed)}")
        chosen += GPU_PRESETS if name == "gpu" else [named[name]]
    return tuple(chosen) if chosen else PRESETS


def check_loads(loads: Sequence[str]) -> tuple[str, ...]:
    """Return the loads without repetitions; raise UsageError for an unknown one."""
    for load in loads:
        if load not in LOADS:
            raise build_unknown_error("--load", load, LOADS)
    return tuple(dict.fromkeys(loads))
