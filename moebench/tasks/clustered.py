"""Made data whose right experts are known: each cluster of tokens needs a map of its own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from moebench.errors import require
from moebench.ranks import Span
from moebench.seeds import make_generator
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskFacts


class VectorEmbedding(nn.Linear):
    """The projection of input vectors into the model."""

    def init_weights(self, generator: Generator) -> None:
        """Draw weights that keep the variance."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


class VectorHead(nn.Linear):
    """The projection to the vector that is said."""

    def init_weights(self, generator: Generator) -> None:
        """Start at zero."""
        nn.init.zeros_(self.weight)


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="mse",
        lower_is_better=True,
        data="made here: vectors around the centres of clusters",
        labels="the cluster of the token",
    )
)
class Clustered(Task):
    """Regression in which a token's cluster says which linear map applies: y = A_c (x - m_c) / spread + noise.

    The centre m_c alone says nothing about y, so a model must both find the cluster and know its map. Clusters of one
    sequence are drawn independently, so attention has nothing to add. After the clustered data of Chen et al. 2022
    (arXiv:2208.02813), with maps instead of classes.

    `mse` is per number of y, whose variance is 1 + noise²; `oracle_gap` is what it exceeds the error of the generating
    maps by, on the same tokens. The loss is half the squared error of a token: the negative log-likelihood in nats
    under a Gaussian of unit variance, but for a constant.
    """

    domains = ("made",)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the clustered task."""

        name: str = "clustered"
        sequence_length: int = 16
        """Tokens per sequence."""
        num_clusters: int = 8
        """Clusters, all as frequent."""
        width: int = 16
        """Numbers in a token's vector, and in what is to be said."""
        spread: float = 0.5
        """Standard deviation of a token around its centre; centres have variance 1."""
        noise: float = 0.1
        """Standard deviation of what no model can say."""
        eval_sequences: int = 64
        """Sequences in an evaluation."""
        data_seed: int = 0
        """Of centres, maps and evaluation sets; the cell's seed draws the training data."""

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            for key in ("sequence_length", "num_clusters", "width", "eval_sequences"):
                require(getattr(self, key) >= 1, f"task.{key}", getattr(self, key), "at least 1")
            require(self.spread > 0, "task.spread", self.spread, "greater than 0")
            require(self.noise >= 0, "task.noise", self.noise, "at least 0")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sequence_length = config.sequence_length
        self.digest = self.eval_digest = self.source_digest(config)
        source = make_generator("clustered", config.data_seed)
        self.centre_YW = torch.randn(config.num_clusters, config.width, generator=source)
        self.map_YWV = torch.randn(config.num_clusters, config.width, config.width, generator=source)
        self.map_YWV *= config.width**-0.5

    @classmethod
    def source_digest(cls, config: Any) -> str:
        """Identify the data: all options decide it."""
        return hashlib.sha256(repr(config).encode()).hexdigest()[:12]

    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "Clustered":
        """Draw centres and maps; nothing is read."""
        return cls(config)

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Return the clusters: places mean nothing here, and there is one domain."""
        values = tuple(str(cluster) for cluster in range(self.config.num_clusters))
        return (LabelKind(name="cluster", values=values, read=_cluster_BL),)

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Draw the batch of a step."""
        span = range(batch_size)[part]
        whole = self._batch(batch_size, "train", seed, step)
        if len(span) == batch_size:
            return whole
        return whole.part(Span(start=span.start, length=len(span), total=batch_size))

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Draw the fixed sequences of a split, as one batch whatever the size of those in training."""
        return [self._batch(self.config.eval_sequences, split)]

    def _batch(self, size: int, *purpose: object) -> Batch:
        config, source = self.config, make_generator("clustered", self.config.data_seed, *purpose)
        shape = (size, self.sequence_length)
        label_BL = torch.randint(config.num_clusters, shape, generator=source)
        away_BLW = config.spread * torch.randn(*shape, config.width, generator=source)
        input_BLW = self.centre_YW[label_BL] + away_BLW
        noise_BLW = config.noise * torch.randn(*shape, config.width, generator=source)
        return Batch(
            input_BL=input_BLW,
            target_BP=self.mapped(input_BLW, label_BL) + noise_BLW,
            weight_BP=torch.full(shape, config.width),
            domain_B=torch.zeros(size, dtype=torch.int64),
            label_BL=label_BL,
        )

    def mapped(self, input_BLW: Tensor, label_BL: Tensor) -> Tensor:
        """Return what the generating maps make of the input: y without its noise."""
        centre_YW, map_YWV = self.centre_YW.to(input_BLW.device), self.map_YWV.to(input_BLW.device)
        away_BLW = (input_BLW - centre_YW[label_BL]) / self.config.spread
        return (map_YWV[label_BL] @ away_BLW[..., None])[..., 0]

    def build_embedding(self, d_model: int) -> nn.Module:
        """Return a projection."""
        return VectorEmbedding(self.config.width, d_model, bias=False)

    def build_head(self, d_model: int) -> nn.Module:
        """Return a projection."""
        return VectorHead(d_model, self.config.width, bias=False)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return half the squared error of each token, in fp32."""
        return 0.5 * (output.float() - batch.target_BP).square().sum(-1)

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return the squared errors of the model and of the generating maps, and how many numbers there are."""
        assert batch.label_BL is not None
        best_BLW = self.mapped(batch.input_BL, batch.label_BL)
        errors = {"model": output, "maps": best_BLW}
        squares = {name: (y.double() - batch.target_BP).square().sum((1, 2)) for name, y in errors.items()}
        return squares | {"numbers": batch.weight_BP.sum(1)}

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean squared error, and its excess over that of the generating maps."""
        number = float(sums["numbers"].sum())
        model, maps = float(sums["model"].sum()) / number, float(sums["maps"].sum()) / number
        return {"mse": model, "oracle_gap": model - maps}


def _cluster_BL(batch: Batch) -> Tensor:
    assert batch.label_BL is not None
    return batch.label_BL
