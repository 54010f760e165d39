"""Synthetic regression whose best experts are known: each cluster of tokens has its own linear map."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE, Range, check_ranges
from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.regression import compute_regression_baselines
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskConfig, TaskFacts


class VectorEmbedding(nn.Linear):
    """The projection of input vectors into the model."""

    def init_weights(self, generator: Generator) -> None:
        """Draw weights with variance 1 / fan-in."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


class VectorHead(nn.Linear):
    """The projection to the predicted vector."""

    def init_weights(self, generator: Generator) -> None:
        """Set the weights to zero."""
        nn.init.zeros_(self.weight)


@TASKS.register(
    TaskFacts(
        output="vectors",
        causal=False,
        metric="mse",
        lower_is_better=True,
        data="synthetic: vectors around the centres of clusters",
        labels="the cluster of the token",
    )
)
class Clustered(Task):
    """Regression in which the cluster c of a token determines a linear map: y = A_c (x - m_c) / spread + noise.

    The centre m_c is independent of y, so a model must both identify the cluster and learn its map. The clusters of a
    sequence are drawn independently, so attention does not help. After the clustered data of Chen et al. 2022
    (arXiv:2208.02813), with maps instead of classes.

    `mse` is the squared error per component of y, whose variance is 1 + noise²; `oracle_gap` is its excess over the
    error of the generating maps on the same tokens. The loss is half the squared error of a token: up to a constant,
    the negative log-likelihood in nats under a Gaussian of unit variance.
    """

    domains = ("made",)

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        """Options of the clustered task."""

        RANGES: ClassVar[Mapping[str, Range]] = {
            **dict.fromkeys(("sequence_length", "num_clusters", "width", "eval_sequences"), AT_LEAST_1),
            "spread": POSITIVE,
            "noise": AT_LEAST_0,
        }

        name: str = "clustered"
        sequence_length: int = 16
        """Tokens per sequence."""
        num_clusters: int = 8
        """Number of clusters, all equally frequent."""
        width: int = 16
        """Number of components of a token's vector and of its target."""
        spread: float = 0.5
        """Standard deviation of a token around the centre of its cluster; centres have variance 1."""
        noise: float = 0.1
        """Standard deviation of the noise in the target, which no model can predict."""
        eval_sequences: int = 64
        """Number of sequences in an evaluation."""
        data_seed: int = 0
        """Seed of centres, maps and evaluation sets; training data use the seed of the cell."""

        def __post_init__(self) -> None:
            check_ranges(self, "task")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sequence_length = config.sequence_length
        self.digest = self.eval_digest = self.source_digest(config)
        source = make_generator("clustered", config.data_seed)
        self.centre_YW = torch.randn(config.num_clusters, config.width, generator=source)
        self.map_YWV = torch.randn(config.num_clusters, config.width, config.width, generator=source)
        self.map_YWV *= config.width**-0.5

    @override
    @classmethod
    def source_digest(cls, config: Any) -> str:
        return hashlib.sha256(repr(config).encode()).hexdigest()[:12]

    @override
    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "Clustered":
        return cls(config)

    @override
    def label_kinds(self) -> tuple[LabelKind, ...]:
        # Positions are exchangeable and there is one domain.
        values = tuple(str(cluster) for cluster in range(self.config.num_clusters))
        return (LabelKind(name="cluster", values=values, read=_cluster_BL),)

    @override
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        rows = range(batch_size)[part]
        batch = self._batch(batch_size, "train", seed, step)
        if len(rows) == batch_size:
            return batch
        return batch.part(Span(start=rows.start, length=len(rows), total=batch_size))

    @override
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        return [self._batch(self.config.eval_sequences, split)]

    def _batch(self, size: int, *purpose: object) -> Batch:
        config, source = self.config, make_generator("clustered", self.config.data_seed, *purpose)
        shape = (size, self.sequence_length)
        label_BL = torch.randint(config.num_clusters, shape, generator=source)
        offset_BLW = config.spread * torch.randn(*shape, config.width, generator=source)
        input_BLW = self.centre_YW[label_BL] + offset_BLW
        noise_BLW = config.noise * torch.randn(*shape, config.width, generator=source)
        return Batch(
            input_BL=input_BLW,
            target_BP=self.apply_maps(input_BLW, label_BL) + noise_BLW,
            weight_BP=torch.full(shape, config.width),
            domain_B=torch.zeros(size, dtype=torch.int64),
            label_BL=label_BL,
        )

    def apply_maps(self, input_BLW: Tensor, label_BL: Tensor) -> Tensor:
        """Return the targets of the input without noise."""
        centre_YW, map_YWV = self.centre_YW.to(input_BLW.device), self.map_YWV.to(input_BLW.device)
        offset_BLW = (input_BLW - centre_YW[label_BL]) / self.config.spread
        return (map_YWV[label_BL] @ offset_BLW[..., None])[..., 0]

    @override
    def build_embedding(self, d_model: int) -> nn.Module:
        return VectorEmbedding(self.config.width, d_model, bias=False)

    @override
    def build_head(self, d_model: int) -> nn.Module:
        return VectorHead(d_model, self.config.width, bias=False)

    @override
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (output.float() - batch.target_BP).square().sum(-1)

    @override
    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        assert batch.label_BL is not None
        noiseless_BLW = self.apply_maps(batch.input_BL, batch.label_BL)
        predictions = {"model": output, "maps": noiseless_BLW}
        errors = {name: (y.double() - batch.target_BP).square().sum((1, 2)) for name, y in predictions.items()}
        return errors | {"components": batch.weight_BP.sum(1)}

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        number = float(sums["components"].sum())
        model, maps = float(sums["model"].sum()) / number, float(sums["maps"].sum()) / number
        return {"mse": model, "oracle_gap": model - maps}

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return compute_regression_baselines(self, split)


def _cluster_BL(batch: Batch) -> Tensor:
    assert batch.label_BL is not None
    return batch.label_BL
