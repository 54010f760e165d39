"""The schema of a configuration: every key of a cell and of an experiment, with its default, range and meaning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moebench.checkpoint_config import CheckpointConfig
from moebench.components import LayoutConfig, RouterConfig, TaskConfig
from moebench.conversion import Untyped
from moebench.errors import require
from moebench.init_config import InitConfig
from moebench.model_config import ModelConfig as ModelConfig
from moebench.optimizer_config import OptimizerConfig
from moebench.ranges import (
    AT_LEAST_0,
    AT_LEAST_0_FINITE,
    AT_LEAST_1,
    BELOW_1,
    FRACTION,
    POSITIVE,
    POSITIVE_FINITE,
    Range,
    at_least_1_up_to,
    check_ranges,
)
from moebench.stage_config import StageConfig, check_stages
from moebench.step_config import StepConfig
from moebench.tuning_config import TuneConfig

COMPONENTS = ("task", "layout", "router")
"""The sections of a cell that a `name` picks from a registry."""
SECTIONS = ("model", "train", "balance", "parallel", "init")
"""The sections that have the same keys in every cell."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizerConfig, StepConfig, CheckpointConfig):
    """Optimizer, schedule and intervals of training: the same for every arm of a comparison.

    Schedule: linear warm-up, then what `schedule` names. The learning rate of update u = 0, 1, ..., steps - 1 is the
    peak times (u + 1) / warmup_steps if u < warmup_steps, and then

        cosine          final_rate + (1 - final_rate) * (1 + cos(pi * p)) / 2
        linear          final_rate + (1 - final_rate) * (1 - p)
        wsd             final_rate + (1 - final_rate) * f(q)
        constant        1
        inverse_sqrt    sqrt(max(1, warmup_steps) / (u + 1))

    with p = min(1, (u - warmup_steps) / max(1, steps - warmup_steps)), q = max(0, min(1, (u - s) / max(1, steps - s)))
    from the start of the decay, s = max(warmup_steps, steps - round(decay_fraction * steps)), and f(q) by decay_shape:
    linear 1 - q, cosine (1 + cos(pi * q)) / 2, sqrt 1 - sqrt(q).

    AdamW (arXiv:1711.05101) is the fused update of torch with eps = 1e-8. Muon (kellerjordan.github.io/posts/muon)
    updates an n_out x n_in matrix W with the gradient G by

        M <- m M + (1 - m) G               m: muon_momentum
        O =  NS((1 - m) G + m M)           NS makes singular values about 1
        W <- W - rate * (decay W + c O)    c: muon_scaling

    where NS(X) is five times X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X, from X / |X| in the Frobenius norm,
    in the precision of forward passes: singular values end between about 0.7 and 1.2. These are the formulas of
    torch.optim.Muon. Queries, keys and values, the two halves of a gated projection, and each expert are matrices of
    their own; with experts on several processes each process updates its own and communicates nothing. An update of an
    m x n matrix (m <= n) costs 5 (4 m^2 n + 2 m^3) FLOPs, whatever the batch. The size of M has no effect: an expert
    without tokens keeps moving in the direction of its momentum with full steps, and clip_norm changes only how
    gradients of different steps are mixed.

    Learning rates: those of router, experts, embeddings and head follow the same schedule from their own peaks. A group
    is what a parameter belongs to in the model; the output that shares the embedding is an embedding.

    Weight decay is decoupled and multiplied by the learning rate. It applies to parameters of two or more dimensions
    (projections, embedding tables, stacked expert weights) in weight_decay_groups; gains and biases are not decayed.

    mup_base_width = b keeps the sizes of activations and of their changes equal at every width (muP, arXiv:2203.03466,
    table 3), so that rates tuned at d_model = b serve a model that is r = d_model / b times as wide in everything:
    d_model, ffn_width, expert_width and the number of heads, whose width is kept. The output and gates, which read the
    width and do not grow, start r^(1/2) times smaller. AdamW's rate of everything that reads the width (hidden
    matrices, experts, gates, output) is divided by r. Muon's rate of an n_out x n_in matrix is multiplied by
    sqrt(n_out / n_in) / c over the same of the base: where both dimensions grow, r^(-1/2) with match_rms_adamw and 1
    with original. Weight decay is divided by the same factor, which keeps its product with the rate. Embeddings, biases
    and gains stay as they are. It needs an output that does not share the embedding.

    Before each update the gradient of all parameters together, over all processes, is scaled down to clip_norm where
    its L2 norm is larger; a loss or norm that is not finite ends the run as diverged, without the update.
    spike_policy chooses what happens after a spike of the loss.

    State and precision: parameters, gradients, moments and router computations are fp32. precision=bf16
    runs forward passes under torch.autocast, in training and evaluation. A checkpoint holds parameters, moments, the
    step and the state of routers; batches and noise are functions of the seed and the step, so resuming repeats a run
    exactly.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "steps": at_least_1_up_to(10**8),
        **dict.fromkeys(("batch_size", "accumulate"), at_least_1_up_to(2**20)),
        "threads": at_least_1_up_to(1024),
        **dict.fromkeys(("eval_every", "log_every", "checkpoint_every"), AT_LEAST_1),
        **dict.fromkeys(("learning_rate", "clip_norm", "spike_threshold"), POSITIVE_FINITE),
        **dict.fromkeys(("warmup_steps", "skip_batches"), AT_LEAST_0),
        **dict.fromkeys(("weight_decay", "z_loss"), AT_LEAST_0_FINITE),
        **dict.fromkeys(("beta1", "beta2"), BELOW_1),
        "final_rate": FRACTION,
        "spike_window": Range(low=8),
        "max_epochs": POSITIVE,
    }

    batch_size: int = 8
    """Sequences per update, over all processes."""
    accumulate: int = 1
    """Micro-batches per update; capacity and balance losses are computed per micro-batch."""
    learning_rate: float = 2e-3
    """Peak learning rate of all parameters whose group does not set its own."""
    warmup_steps: int = 100
    """Updates of linear warm-up."""
    final_rate: float = 0.0
    """Learning rate at the end of cosine, linear and wsd, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Weight decay, for parameters of two or more dimensions in weight_decay_groups."""
    beta1: float = 0.9
    """AdamW's coefficient of the running mean of gradients."""
    beta2: float = 0.95
    """AdamW's coefficient of the running mean of squared gradients."""
    clip_norm: float = 1.0
    """Maximum L2 norm of the gradient of all parameters together."""
    z_loss: float = 0.0
    """Coefficient of log² Z of the output, Z the sum of its softmax: 1e-4 in PaLM (arXiv:2204.02311, section 5)."""
    max_epochs: float | None = None
    """Maximum number of passes over the training split that `run` accepts; null: 4 for text (repeated up to four times
    it is worth almost as much as new text, arXiv:2305.16264) without task.train_windows, no limit elsewhere; inf: no
    limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward passes: bf16 is autocast; parameters, optimizer state and routing stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run; auto is CUDA if a device is available, else the CPU."""
    threads: int = 1
    """CPU threads of one process; part of the cell's id, because they change the last bit of sums."""
    eval_every: int = 300
    """Updates between evaluations on the validation split."""
    log_every: int = 20
    """Updates between points of the journal."""
    spike_policy: Literal["record", "stop", "skip", "rewind"] = "record"
    """After a loss spike: record it and continue; end the run; leave out the update, also where only the gradient norm
    spikes; or go back to the last checkpoint and leave out the batches since then."""
    spike_window: int = 128
    """Number of earlier updates that a loss is compared with."""
    spike_threshold: float = 6.0
    """Robust standard deviations above the median of the window from which a loss counts as a spike."""

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        divides = self.batch_size % self.accumulate == 0
        require(divides, "train.accumulate", self.accumulate, f"a divisor of train.batch_size={self.batch_size}")
        self.check_kept_steps()
        self.check_step()


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How auxiliary losses see the batch when several processes share it."""

    scope: Literal["global", "local"] = "global"
    """Tokens that balance losses are computed over: those of all processes, or each process's own, then averaged."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh of processes of one run, data x expert; each process has a part of the batch."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **dict.fromkeys(("data", "expert", "nodes"), at_least_1_up_to(4096)),
        "check_every": AT_LEAST_1,
        **dict.fromkeys(("timeout_s", "stall_timeout_s"), Range(low=0, includes_low=False, limit=10**7)),
    }

    data: int = 1
    """Replicas of the experts; all other parameters are replicated on every process."""
    expert: int = 1
    """Processes over which the experts of one replica are sharded (expert parallelism)."""
    scope: Literal["global", "local"] = "global"
    """Tokens seen by capacity and by routers that choose from the whole batch: those of all processes, or of one."""
    devices: int | None = None
    """Processes per node; null: data * expert / nodes."""
    nodes: int = 1
    """Machines; more than one needs torchrun or SLURM."""
    timeout_s: float = 600.0
    """Seconds that a process waits for another one before the run fails."""
    stall_timeout_s: float = 600.0
    """Seconds without a finished step or evaluation batch after which the run fails, also with one process."""
    check_every: int = 100
    """Steps between bit-by-bit comparisons of replicas; a difference ends the run."""
    overlap: bool = True
    """Compute shared experts while tokens are in flight to routed experts."""
    shard_optimizer: bool = False
    """Divide the state of the optimizer among the processes with equal copies of a parameter; results stay the same."""
    async_checkpoints: bool = False
    """Write checkpoints from a copy in memory while training continues."""

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.data * self.expert

    def __post_init__(self) -> None:
        check_ranges(self, "parallel")
        product = f"parallel.data={self.data} times parallel.expert={self.expert}"
        divides = self.world_size % self.nodes == 0
        require(divides, "parallel.nodes", self.nodes, f"a divisor of {product} = {self.world_size}")
        per_node = self.world_size // self.nodes
        allowed = f"{per_node}, or null: {product} on {self.nodes} nodes"
        require(self.devices in (None, per_node), "parallel.devices", self.devices, allowed)


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """One training run: together with the content of the data it determines every number.

    Besides the keys below a cell has the sections task, model, layout, router, train, balance, parallel and init.
    """

    task: TaskConfig
    """Data, input, head and metrics: the Config of a registered task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig
    """Which blocks hold experts, and of which shape: the Config of a registered layout."""
    router: RouterConfig
    """The routing algorithm: the Config of a registered router."""
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: int = 0
    """Seed of initial weights, data order and routing noise; from 0 to 2^31 - 1."""
    allow_noncausal: bool = False
    """Allow a router that depends on later tokens on a causal task; every table marks the arm."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")
        base_width, head_width = self.train.mup_base_width, self.model.d_model // self.model.num_heads
        keeps_heads = base_width is None or base_width % head_width == 0
        require(keeps_heads, "train.mup_base_width", base_width, f"a multiple of the width of a head, {head_width}")
        is_shared = base_width is not None and self.model.tie_embeddings
        allowed = "null with model.tie_embeddings, whose weights would need one rate as input and another as output"
        require(not is_shared, "train.mup_base_width", base_width, allowed)
        has_new = self.train.trainable != "new_experts" or self.init.has_parent
        require(has_new, "train.trainable", self.train.trainable, "another value where init.from is null")


DEFAULT_NAMES = {"task": "language", "layout": "every_n", "router": "switch"}
"""The component of each kind that a cell has when it names none."""

MAX_CELLS = 20_000
"""Largest grid of an experiment: a larger one takes minutes to check, and is usually a mistake in anchors or ranges."""
DEFAULT_MARGIN = 0.01


def check_margin(margin: float, key: str) -> None:
    """Raise UsageError unless the margin of equivalence is a share of the baseline's mean."""
    require(0 < margin < 1, key, margin, "above 0 and below 1: a share of the baseline's mean")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """An experiment file: a question, a base configuration, a grid and seeds."""

    question: str = ""
    """The question that the experiment answers, in one sentence."""
    base: Untyped = field(default_factory=dict)
    """Keys of a cell that are the same in every arm."""
    grid: dict[str, list[Untyped]] = field(default_factory=dict)
    """Key -> values; one arm per combination. The key `arm` takes mappings of several keys, each with a label."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """One run of every arm per seed; equal seeds mean equal data order and equal initial weights of shared parts."""
    size: str | None = None
    """Preset for model, data and training (`moebench list sizes`): `base` overrides it, `--size` overrides both."""
    baseline: str | None = None
    """The arm that the others are compared with; null: the first."""
    margin: float = DEFAULT_MARGIN
    """Arms that differ by less than this share of the baseline's mean count as equivalent (from 5 seeds)."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Settings that each arm chooses on validation before it is trained; null on the command line: no tuning."""
    equal: Literal["steps", "training_flops"] = "steps"
    """Equal in all arms: train.steps, or training FLOPs, where the steps of arms follow from those of the baseline."""
    stages: list[StageConfig] = field(default_factory=list)
    """Runs that are trained one after another, each from a run of an earlier stage; the last stage is compared."""

    def __post_init__(self) -> None:
        check_margin(self.margin, "margin")
        check_stages(self.stages)
        repeated = sorted(set(self.seeds) & set(self.tune.seeds)) if self.tune.grid else []
        require(not repeated, "tune.seeds", f"{repeated}, which are in seeds", "seeds that are not reported")
        require(len(self.seeds) > 0, "seeds", self.seeds, "a list with at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "a list that names each seed once")
        for key, values in self.grid.items():
            require(len(values) > 0, f"grid.{key}", values, "a list with at least one value")
        num_cells = math.prod(map(len, self.grid.values())) * len(self.seeds)
        combinations = " x ".join(str(len(values)) for values in (*self.grid.values(), self.seeds))
        given = f"{combinations} = {num_cells}"
        require(num_cells <= MAX_CELLS, "grid times seeds", given, f"at most {MAX_CELLS} cells")
