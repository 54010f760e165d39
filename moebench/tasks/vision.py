"""Image classification with a transformer on patches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.errors import UsageError, build_unknown_error, require
from moebench.ranges import AT_LEAST_1, BELOW_1, Range, check_ranges
from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.classification import (
    MAX_PIXELS,
    ClassBaselines,
    ClassificationData,
    flatten_patches,
    limit_samples,
)
from moebench.tasks.baselines.measure import EVAL_BATCH
from moebench.tasks.images.augment import Augmentation
from moebench.tasks.images.calibration import bin_sums, brier_B, calibration_error
from moebench.tasks.images.few_shot import FewShotConfig, few_shot_accuracy
from moebench.tasks.images.patches import ClassHead, PatchEmbedding, extract_patches, patch_labels, pool
from moebench.tasks.images.prepared import ImageSplit, PreparedImages, prepare
from moebench.tasks.images.sources import ImageDataConfig, source_digest
from moebench.tasks.task import (
    ALL,
    TASKS,
    Batch,
    LabelKind,
    Task,
    TaskConfig,
    TaskFacts,
    average_by_domain,
    domain_label_kind,
)
from moebench.tasks.text.windows import train_window_indices

MAX_CLASS_METRICS = 32
"""Up to this number of classes, the accuracy of each class is a metric."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="accuracy",
        lower_is_better=False,
        data="Fashion-MNIST: 20,000 images for training and validation, 4,000 for testing",
    )
)
class Vision(Task):
    """Image classification on the official test split; a tenth of the training images of each class validates.

    An image is cut into patches, which a linear map and a learned position embedding turn into tokens (ViT,
    arXiv:2010.11929). Blocks also use rotary positions, in row-major order. Training shifts and mirrors images.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        """Options of the vision task."""

        NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path",)
        RANGES: ClassVar[Mapping[str, Range]] = {"label_smoothing": BELOW_1, "eval_images": AT_LEAST_1}

        name: str = "vision"
        patch: int = 4
        """Height and width of a patch in pixels; a divisor of data.size."""
        pooling: Literal["mean", "class_token"] = "mean"
        """Input of the head: the mean of all tokens, or a class token before them."""
        shift: int = 2
        """Maximum shift of training images in pixels, vertically and horizontally; below data.size."""
        mirror: list[str] | None = None
        """Domains whose training images are mirrored with probability 1/2; null: fashion, if it is the embedded set."""
        label_smoothing: float = 0.0
        """Share of a training target that is spread evenly over all classes; not used in evaluation."""
        eval_images: int | None = None
        """Images per domain in an evaluation; null: all."""
        few_shot: FewShotConfig = field(default_factory=FewShotConfig)
        """The few-shot probe on frozen features after training, for data.held_out_classes."""
        data: ImageDataConfig = field(default_factory=ImageDataConfig)
        """Source of the images."""

        def __post_init__(self) -> None:
            size = self.data.size
            allowed = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            fits = self.patch >= 1 and size % self.patch == 0
            require(fits, "task.patch", self.patch, f"a divisor of task.data.size={size} ({allowed})")
            require(0 <= self.shift < size, "task.shift", self.shift, f"at least 0 and below task.data.size={size}")
            check_ranges(self, "task")

        @property
        def sequence_length(self) -> int:
            """Number of tokens per image."""
            return int((self.data.size // self.patch) ** 2) + (self.pooling == "class_token")

    def __init__(self, config: Config, images: PreparedImages) -> None:
        self.config = config
        self.images = images
        self.domains = images.domains
        held_out = config.data.held_out_classes
        kept = [label for label in range(len(images.classes)) if label not in held_out]
        _check_held_out(kept, images, config)
        self.class_of_K = np.array(kept)
        """Class of each output of the head."""
        self.output_of_C = np.full(len(images.classes), -1)
        self.output_of_C[kept] = np.arange(len(kept))
        mirrored = ("fashion",) if config.mirror is None and config.data.is_embedded else config.mirror or ()
        for name in config.mirror or ():
            if name not in images.domains:
                raise build_unknown_error("task.mirror", name, images.domains)
        self.mirror_D = np.array([name in mirrored for name in images.domains])
        self.digest = _digest(images.digest, sorted(held_out))
        self.eval_digest = _digest(self.digest, config.eval_images, "accuracy")
        self.sequence_length = config.sequence_length
        # Of each component of a patch, in which channels alternate.
        self.mean_X, self.std_X = (np.tile(of_C, config.patch**2) for of_C in (images.mean_C, images.std_C))
        self.train_I = np.flatnonzero(self.output_of_C[images.train.label_N] >= 0)
        """Images of the training split without held-out classes."""

    @override
    @classmethod
    def source_digest(cls, config: Any) -> str:
        return source_digest(config.data)

    @override
    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "Vision":
        return cls(config, prepare(config.data, cache))

    @override
    def label_kinds(self) -> tuple[LabelKind, ...]:
        config = self.config
        names = tuple(self.images.classes[label] for label in self.class_of_K)
        positions, label_L = patch_labels(config.data.size // config.patch, with_class_token=config.pooling != "mean")
        return (
            domain_label_kind(self.domains),
            LabelKind(name="class", values=names, read=lambda batch: batch.target_BP),
            LabelKind(name="position", values=positions, read=lambda batch: label_L.to(batch.target_BP.device)[None]),
        )

    @override
    def list_train_samples(self, batch_size: int, seed: int, step: int) -> list[int]:
        return [int(index) for index in self.train_I[train_window_indices(len(self.train_I), batch_size, seed, step)]]

    def count_train_samples(self) -> int:
        """Return the number of images of the training split."""
        return len(self.train_I)

    @override
    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        index_B = self.train_I[train_window_indices(len(self.train_I), batch_size, seed, step)[part]]
        split = self.images.train.select(index_B)
        augmentation = Augmentation.draw(batch_size, self.config.shift, seed, step)
        pixel_BHWC = augmentation.select(part, self.mirror_D[split.domain_N])(split.pixel_NHWC)
        return self._batch(pixel_BHWC, self.output_of_C[split.label_N], split.domain_N)

    @override
    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        images: ImageSplit = getattr(self.images, split)
        is_kept_N, limit = self.output_of_C[images.label_N] >= 0, self.config.eval_images
        of_domain_D = [np.flatnonzero(is_kept_N & (images.domain_N == domain)) for domain in range(len(self.domains))]
        # In random order, so that the images that share the capacity of a batch are of all domains.
        index_I = np.sort(np.concatenate([member_I[:limit] for member_I in of_domain_D]))
        return self._build_unaugmented_batches(images, index_I, batch_size)

    @override
    def compute_baselines(self, split: str) -> Sequence[TrivialBaseline]:
        return self._class_baselines.evaluate(split)

    @cached_property
    def _class_baselines(self) -> ClassBaselines:
        width = self.config.data.size**2 * self.config.data.num_channels
        number = limit_samples(len(self.train_I), width if width <= MAX_PIXELS else width // self.config.patch**2)
        problem = ClassificationData(
            task=self,
            num_classes=len(self.class_of_K),
            batches=self._build_unaugmented_batches(self.images.train, self.train_I[:number], EVAL_BATCH),
            num_used=number,
            read_features=partial(flatten_patches, num_channels=self.config.data.num_channels),
            spread_logits=lambda logits_BK, batch: logits_BK,
            feature_name="the pixels" if width <= MAX_PIXELS else "the mean of each patch",
        )
        return ClassBaselines(problem)

    def _build_unaugmented_batches(self, split: ImageSplit, index_I: np.ndarray, batch_size: int) -> list[Batch]:
        parts = [split.select(index_I[start : start + batch_size]) for start in range(0, len(index_I), batch_size)]
        return [self._batch(part.pixel_NHWC, self.output_of_C[part.label_N], part.domain_N) for part in parts]

    def _batch(self, pixel_BHWC: np.ndarray, target_B: np.ndarray, domain_B: np.ndarray) -> Batch:
        # Cut while a pixel is one byte, and normalised in place: the trainer waits for this.
        patch_BLX = extract_patches(torch.from_numpy(pixel_BHWC), self.config.patch).numpy().astype(np.float32)
        patch_BLX /= 255
        patch_BLX -= self.mean_X
        patch_BLX /= self.std_X
        target_BP = torch.from_numpy(target_B.astype(np.int64))[:, None]
        return Batch(
            input_BL=torch.from_numpy(patch_BLX),
            target_BP=target_BP,
            weight_BP=torch.ones_like(target_BP),
            domain_B=torch.from_numpy(domain_B.astype(np.int64)),
        )

    @override
    def build_embedding(self, d_model: int) -> PatchEmbedding:
        data, with_class_token = self.config.data, self.config.pooling == "class_token"
        num_patches = self.sequence_length - with_class_token
        width = self.config.patch**2 * data.num_channels
        return PatchEmbedding(num_patches, width, d_model, with_class_token=with_class_token)

    @override
    def build_head(self, d_model: int) -> ClassHead:
        return ClassHead(d_model, len(self.class_of_K), self.config.pooling)

    @override
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        target_B = batch.target_BP[:, 0]
        smoothing = self.config.label_smoothing
        loss_B = functional.cross_entropy(output.float(), target_B, label_smoothing=smoothing, reduction="none")
        return loss_B[:, None]

    @override
    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        target_B, logits_BK = batch.target_BP[:, 0], output.float()
        score_BK = logits_BK.softmax(-1)
        confidence_B, predicted_B = score_BK.max(-1)
        correct_B = predicted_B == target_B
        one_hot_BK = functional.one_hot(target_B, score_BK.shape[-1])
        return {
            "weight": torch.ones_like(confidence_B),
            "correct": correct_B,
            "nats": functional.cross_entropy(logits_BK, target_B, reduction="none"),
            "brier": brier_B(score_BK, one_hot_BK),
            "bins": bin_sums(confidence_B, correct_B),
            "class_weight": one_hot_BK,
            "class_correct": one_hot_BK * correct_B[:, None],
        }

    @override
    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = sums["weight"].sum().clamp(min=1)
        metrics = average_by_domain("accuracy", sums["correct"], sums["weight"], self.domains)
        metrics |= {name: (sums[name].sum() / weight).item() for name in ("nats", "brier")}
        metrics["ece"] = calibration_error(sums["bins"].sum(0))
        if len(self.class_of_K) <= MAX_CLASS_METRICS:
            names = [self.images.classes[label] for label in self.class_of_K]
            by_class = average_by_domain(
                "class_accuracy", sums["class_correct"].sum(0), sums["class_weight"].sum(0), names
            )
            metrics |= {name: value for name, value in by_class.items() if name != "class_accuracy"}
        if self.config.data.skip_broken:
            metrics["skipped_images"] = float(self.images.num_skipped)
        return metrics

    @override
    def probe(self, read: Callable[[Batch], Tensor], batch_size: int) -> dict[str, float]:
        held_out, config = self.config.data.held_out_classes, self.config.few_shot
        if not held_out or not config.shots:
            return {}
        train, test = self.images.train, self.images.test
        number = _images_per_class(config)
        support_I = np.concatenate([np.flatnonzero(train.label_N == label)[:number] for label in held_out])
        query_I = np.flatnonzero(np.isin(test.label_N, held_out))
        label_Q = torch.tensor([held_out.index(label) for label in test.label_N[query_I]])

        def features(split: ImageSplit, index_I: np.ndarray) -> Tensor:
            batches = self._build_unaugmented_batches(split, index_I, batch_size)
            return torch.cat([pool(read(batch), self.config.pooling).cpu() for batch in batches])

        support_CND = features(train, support_I).view(len(held_out), number, -1)
        return few_shot_accuracy(support_CND, features(test, query_I), label_Q, config)


def _images_per_class(config: FewShotConfig) -> int:
    return max(config.shots, default=0) * config.draws


def _check_held_out(kept: Sequence[int], images: PreparedImages, config: Any) -> None:
    """Raise UsageError for held-out classes that do not exist, leave fewer than two, or have too few images."""
    held_out, last = config.data.held_out_classes, len(images.classes) - 1
    fits = all(label <= last for label in held_out) and len(kept) >= 2
    require(fits, "task.data.held_out_classes", held_out, f"classes from 0 to {last}, so that at least two are left")
    needed = _images_per_class(config.few_shot)
    for label in held_out:
        number = int((images.train.label_N == label).sum())
        if number < needed:
            raise UsageError(
                f"task.few_shot: {config.few_shot.draws} draws of {max(config.few_shot.shots)} images need {needed} of"
                f" class '{images.classes[label]}', which has {number} for training; lower draws or shots"
            )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
