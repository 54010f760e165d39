"""Image classification: a transformer on patches says what a picture shows; quality in accuracy."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import UsageError, require, unknown
from moebench.tasks.images.augment import Augmentation
from moebench.tasks.images.calibration import bin_sums, brier_B, calibration_error
from moebench.tasks.images.config import ImageDataConfig
from moebench.tasks.images.few_shot import FewShotConfig, few_shot_accuracy
from moebench.tasks.images.patches import ClassHead, PatchEmbedding, patch_labels, patches_of, pooled
from moebench.tasks.images.prepared import ImageSplit, PreparedImages, prepare
from moebench.tasks.images.sources import source_digest
from moebench.tasks.task import ALL, TASKS, Batch, LabelKind, Task, TaskFacts, average_by_domain, domain_label_kind
from moebench.tasks.text.windows import train_window_indices

MOST_CLASSES = 32
"""Up to so many, the accuracy of each class is a metric of its own."""


@TASKS.register(
    TaskFacts(
        causal=False,
        metric="accuracy",
        lower_is_better=False,
        data="Fashion-MNIST, 20,000 images to train and validate on and 4,000 to test on",
    )
)
class Vision(Task):
    """What does the picture show? The official test split, and a tenth of the training images of each class held back.

    An image is cut into squares; each becomes a vector by one linear map plus a learned vector for its place (ViT,
    arXiv:2010.11929). The blocks add their rotary angles, along the rows. Training shifts images and mirrors them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the vision task."""

        NOT_IN_ID: ClassVar[tuple[str, ...]] = ("data.path",)

        name: str = "vision"
        patch: int = 4
        """Height and width of the squares that an image is cut into, in pixels: one vector each."""
        pooling: Literal["mean", "class_token"] = "mean"
        """What the head reads: the mean of all vectors, or one vector more that stands before them."""
        shift: int = 2
        """Pixels by which training moves an image at most, up or down and left or right."""
        mirror: list[str] | None = None
        """Domains whose images training mirrors half of the time; null: fashion, if it is the embedded one."""
        label_smoothing: float = 0.0
        """Share of a training target that is spread evenly over all classes; evaluation has none."""
        eval_images: int | None = None
        """Images of each domain in an evaluation; null takes all."""
        few_shot: FewShotConfig = field(default_factory=FewShotConfig)
        """The probe on frozen features, after the training, with data.held_out_classes."""
        data: ImageDataConfig = field(default_factory=ImageDataConfig)
        """Where the images come from."""

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            size = self.data.size
            allowed = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            fits = self.patch >= 1 and size % self.patch == 0
            require(fits, "task.patch", self.patch, f"a divisor of task.data.size={size} ({allowed})")
            require(0 <= self.shift < size, "task.shift", self.shift, f"at least 0 and below task.data.size={size}")
            smoothing = self.label_smoothing
            require(0 <= smoothing < 1, "task.label_smoothing", smoothing, "at least 0 and below 1")
            some = self.eval_images is None or self.eval_images >= 1
            require(some, "task.eval_images", self.eval_images, "at least 1, or null for all")

        @property
        def sequence_length(self) -> int:
            """Vectors that an image becomes."""
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
                raise unknown("task.mirror", name, images.domains)
        self.mirror_D = np.array([name in mirrored for name in images.domains])
        self.digest = _digest(images.digest, sorted(held_out))
        self.eval_digest = _digest(self.digest, config.eval_images, "accuracy")
        self.sequence_length = config.sequence_length
        # Of each number in a square, whose channels take turns.
        self.mean_X, self.std_X = (np.tile(of_C, config.patch**2) for of_C in (images.mean_C, images.std_C))
        self.train_I = np.flatnonzero(self.output_of_C[images.train.label_N] >= 0)
        """The images of the training split that are trained on."""

    @classmethod
    def source_digest(cls, config: Any) -> str:
        """Digest the images and how they are decoded."""
        return source_digest(config.data)

    @classmethod
    def prepare(cls, config: Any, cache: Path) -> "Vision":
        """Decode and divide the images, or take them from the cache."""
        return cls(config, prepare(config.data, cache))

    def label_kinds(self) -> tuple[LabelKind, ...]:
        """Return the domain and the class of the image, and the place of the square in it."""
        config = self.config
        names = tuple(self.images.classes[label] for label in self.class_of_K)
        places, label_L = patch_labels(config.data.size // config.patch, with_class_token=config.pooling != "mean")
        return (
            domain_label_kind(self.domains),
            LabelKind(name="class", values=names, read=lambda batch: batch.target_BP),
            LabelKind(name="position", values=places, read=lambda batch: label_L.to(batch.target_BP.device)[None]),
        )

    def train_batch(self, batch_size: int, seed: int, step: int, part: slice = ALL) -> Batch:
        """Take the images of this step in the epoch's shuffled order, each changed in its own way."""
        chosen_B = self.train_I[train_window_indices(len(self.train_I), batch_size, seed, step)[part]]
        split = self.images.train.of(chosen_B)
        change = Augmentation.drawn(batch_size, self.config.shift, seed, step)
        pixel_BHWC = change.of(part, self.mirror_D[split.domain_N])(split.pixel_NHWC)
        return self._batch(pixel_BHWC, self.output_of_C[split.label_N], split.domain_N)

    def eval_batches(self, split: str, batch_size: int) -> Sequence[Batch]:
        """Take the images as they are, the same number of each domain."""
        whole: ImageSplit = getattr(self.images, split)
        is_kept_N, limit = self.output_of_C[whole.label_N] >= 0, self.config.eval_images
        by_domain_D = [np.flatnonzero(is_kept_N & (whole.domain_N == domain)) for domain in range(len(self.domains))]
        # In the drawn order again, or capacity would be shared by images of one domain.
        chosen_I = np.sort(np.concatenate([index_I[:limit] for index_I in by_domain_D]))
        return self._plain_batches(whole, chosen_I, batch_size)

    def _plain_batches(self, split: ImageSplit, index_I: np.ndarray, batch_size: int) -> list[Batch]:
        parts = [split.of(index_I[start : start + batch_size]) for start in range(0, len(index_I), batch_size)]
        return [self._batch(part.pixel_NHWC, self.output_of_C[part.label_N], part.domain_N) for part in parts]

    def _batch(self, pixel_BHWC: np.ndarray, target_B: np.ndarray, domain_B: np.ndarray) -> Batch:
        # Cut while a pixel is one byte, and changed in place: the trainer waits for this.
        patch_BLX = patches_of(torch.from_numpy(pixel_BHWC), self.config.patch).numpy().astype(np.float32)
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

    def build_embedding(self, d_model: int) -> PatchEmbedding:
        """Return the map of patches to vectors."""
        data, with_class_token = self.config.data, self.config.pooling == "class_token"
        num_patches = self.sequence_length - with_class_token
        width = self.config.patch**2 * data.num_channels
        return PatchEmbedding(num_patches, width, d_model, with_class_token=with_class_token)

    def build_head(self, d_model: int) -> ClassHead:
        """Return the pooling and the projection to the classes."""
        return ClassHead(d_model, len(self.class_of_K), self.config.pooling)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each image in nats, with smoothed labels, in fp32."""
        target_B = batch.target_BP[:, 0]
        smoothing = self.config.label_smoothing
        loss_B = functional.cross_entropy(output.float(), target_B, label_smoothing=smoothing, reduction="none")
        return loss_B[:, None]

    def compute_sums(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return for each image what the metrics are made of."""
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

    def compute_quality(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return accuracy over all domains and for each, nats, Brier score, calibration error, accuracy by class."""
        weight = sums["weight"].sum().clamp(min=1)
        found = average_by_domain("accuracy", sums["correct"], sums["weight"], self.domains)
        found |= {name: (sums[name].sum() / weight).item() for name in ("nats", "brier")}
        found["ece"] = calibration_error(sums["bins"].sum(0))
        if len(self.class_of_K) <= MOST_CLASSES:
            names = [self.images.classes[label] for label in self.class_of_K]
            by_class = average_by_domain(
                "class_accuracy", sums["class_correct"].sum(0), sums["class_weight"].sum(0), names
            )
            found |= {name: value for name, value in by_class.items() if name != "class_accuracy"}
        if self.config.data.skip_broken:
            found["skipped_images"] = float(self.images.num_skipped)
        return found

    def probe(self, read: Callable[[Batch], Tensor], batch_size: int) -> dict[str, float]:
        """Return few_shot/K: the test accuracy among classes held out, from K training images of each."""
        held_out, config = self.config.data.held_out_classes, self.config.few_shot
        if not held_out or not config.shots:
            return {}
        train, test = self.images.train, self.images.test
        number = _images_per_class(config)
        support_I = np.concatenate([np.flatnonzero(train.label_N == label)[:number] for label in held_out])
        query_I = np.flatnonzero(np.isin(test.label_N, held_out))
        label_Q = torch.tensor([held_out.index(label) for label in test.label_N[query_I]])

        def features(split: ImageSplit, index_I: np.ndarray) -> Tensor:
            batches = self._plain_batches(split, index_I, batch_size)
            return torch.cat([pooled(read(batch), self.config.pooling).cpu() for batch in batches])

        support_CND = features(train, support_I).view(len(held_out), number, -1)
        return few_shot_accuracy(support_CND, features(test, query_I), label_Q, config)


def _images_per_class(config: FewShotConfig) -> int:
    return max(config.shots, default=0) * config.draws


def _check_held_out(kept: Sequence[int], images: PreparedImages, config: Any) -> None:
    """Refuse held-out classes that do not exist, leave too few, or have too few images for the probe."""
    held_out, last = config.data.held_out_classes, len(images.classes) - 1
    fits = all(label <= last for label in held_out) and len(kept) >= 2
    require(fits, "task.data.held_out_classes", held_out, f"classes from 0 to {last}, at least two of them left")
    needed = _images_per_class(config.few_shot)
    for label in held_out:
        number = int((images.train.label_N == label).sum())
        if number < needed:
            raise UsageError(
                f"task.few_shot: {config.few_shot.draws} draws of {max(config.few_shot.shots)} images need {needed} of"
                f" class '{images.classes[label]}', which has {number} to train on; lower draws or shots"
            )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
