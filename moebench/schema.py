"""The schema of a configuration: what a cell and an experiment are, every key with its default and its meaning."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from moebench.conversion import Untyped
from moebench.errors import require

COMPONENTS = ("task", "layout", "router")
"""The sections of a cell that a `name` picks from a registry."""
SECTIONS = ("model", "train", "balance", "parallel")
"""The sections that are the same for every cell."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer around the experts."""

    d_model: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads; d_model / num_heads must be even."""
    ffn_width: int = 128
    """Hidden width that one token uses: of the dense network, and of its active experts together."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Of dense networks and experts alike."""
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for key in ("d_model", "num_layers", "num_heads", "ffn_width"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        fits = self.d_model % self.num_heads == 0 and self.d_model // self.num_heads % 2 == 0
        require(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "greater than 0")
        require(fits, "model.num_heads", self.num_heads, f"a divisor of d_model={self.d_model} with an even quotient")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How every arm is trained: the same for all of them."""

    steps: int = 1800
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences per step, of all processes together."""
    accumulate: int = 1
    """Micro-batches that a step's batch is cut into; capacity and balance losses then see one at a time."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up, then a cosine down to final_rate of it."""
    warmup_steps: int = 100
    """Steps of the linear warm-up."""
    final_rate: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast, in training and evaluation; parameters, optimizer and routing stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA device where there is one."""
    threads: int = 1
    """CPU threads of one cell; part of the cell, because sums change with it in the last bit."""
    eval_every: int = 300
    """Steps between evaluations on the validation split."""
    log_every: int = 20
    """Steps between points in the journal."""
    checkpoint_every: int = 300
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for key in ("steps", "batch_size", "accumulate", "threads", "eval_every", "log_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        divides = self.batch_size % self.accumulate == 0
        require(divides, "train.accumulate", self.accumulate, f"a divisor of train.batch_size={self.batch_size}")
        for key in ("learning_rate", "clip_norm"):
            require(0 < getattr(self, key) < math.inf, f"train.{key}", getattr(self, key), "greater than 0 and finite")
        for key in ("weight_decay", "warmup_steps"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "at least 0 and below 1")
        require(0 <= self.final_rate <= 1, "train.final_rate", self.final_rate, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Over what the auxiliary losses measure the balance of experts."""

    scope: Literal["global", "local"] = "global"
    """global: the batch of all processes, as one process would; local: each process's own part, then the mean."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The processes of one run: data · expert of them, each with a part of the batch."""

    data: int = 1
    """Copies of the experts; everything else has a copy in every process (DDP)."""
    expert: int = 1
    """Processes that each copy of the experts is spread over."""
    scope: Literal["global", "local"] = "global"
    """Whether capacity and routers that choose from the whole batch see all processes' tokens, or their own."""
    devices: int | None = None
    """Processes on each node; null: all there are to be, divided by nodes."""
    nodes: int = 1
    """Machines; more than one are started by torchrun or SLURM."""
    timeout_s: float = 600.0
    """How long a process waits for another one before the run ends as failed."""
    check_every: int = 100
    """Steps between comparisons of the copies bit by bit; a difference ends the run."""
    overlap: bool = True
    """Compute shared experts while rows are on their way to routed ones."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.data * self.expert

    def __post_init__(self) -> None:
        """Refuse sizes that make no mesh of processes."""
        for key in ("data", "expert", "nodes", "check_every"):
            require(getattr(self, key) >= 1, f"parallel.{key}", getattr(self, key), "at least 1")
        require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "greater than 0")
        product = f"parallel.data={self.data} times parallel.expert={self.expert}"
        fits = self.world_size % self.nodes == 0
        require(fits, "parallel.nodes", self.nodes, f"a divisor of {product} = {self.world_size}")
        per_node = self.world_size // self.nodes
        fits = self.devices is None or self.devices == per_node
        require(fits, "parallel.devices", self.devices, f"{per_node}, or null: {product} on {self.nodes} nodes")


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """One training run, complete: together with the data it decides every number."""

    task: Any
    """Data, input, head and metrics: the Config of a registered task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: Any
    """Which blocks hold experts, and what they are: the Config of a registered layout."""
    router: Any
    """The routing algorithm: the Config of a registered router."""
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    """Initial weights, data order and routing noise."""
    allow_noncausal: bool = False
    """Let a router that sees the future run on a causal task; every table marks the arm."""

    def __post_init__(self) -> None:
        """Refuse seeds that no generator takes."""
        require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")


DEFAULT_NAMES = {"task": "language", "layout": "every_n", "router": "switch"}


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """An experiment file: a question, a base configuration and a grid."""

    question: str = ""
    """What the experiment answers, in a sentence."""
    base: Untyped = field(default_factory=dict)
    """The keys of a cell that are the same everywhere."""
    grid: dict[str, list[Untyped]] = field(default_factory=dict)
    """Key -> values: one arm for each combination. The key `arm` takes labelled mappings of several keys."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run of every arm for each seed; the same seed means the same data order and shared initial weights."""
    baseline: str | None = None
    """The arm that the others are compared with; null takes the first."""

    def __post_init__(self) -> None:
        """Refuse grids and seeds that make no cells."""
        require(len(self.seeds) > 0, "seeds", self.seeds, "a list with at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "a list that names each seed once")
        for key, values in self.grid.items():
            require(len(values) > 0, f"grid.{key}", values, "a list with at least one value")
