"""Images as arrays: decoded, divided and kept on disk, then read in place by every run."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moebench.errors import UsageError
from moebench.tasks.images.config import ImageDataConfig
from moebench.tasks.images.sources import Entry, class_names, read_entries, source_digest
from moebench.tasks.stored import Arrays, stored

FORMAT = 1  # raise it when the decoding, the split or the files change
SPLITS = ("train", "validation", "test")
HELD_BACK = 0.1
"""Share of a class that validates, and that tests where the source has no test set."""
SPLIT_SEED = 20220905


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSplit:
    """One split, in an order without meaning: any first part of it is a fair sample."""

    pixel_NHWC: np.ndarray
    """uint8 [image, row, column, channel], read in place from disk."""
    label_N: np.ndarray
    """int64 index into `PreparedImages.classes`."""
    domain_N: np.ndarray
    """int64 index into `PreparedImages.domains`."""

    def of(self, index_N: np.ndarray) -> "ImageSplit":
        """Return some of the images."""
        return ImageSplit(
            pixel_NHWC=self.pixel_NHWC[index_N], label_N=self.label_N[index_N], domain_N=self.domain_N[index_N]
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImages:
    """The three splits of a source of images and what is known about them."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    mean_C: np.ndarray
    """Mean of each channel over the training split, white is 1 (float32)."""
    std_C: np.ndarray
    """Standard deviation of the same."""
    num_skipped: int
    """Images that could not be read."""
    digest: str
    """SHA-256 (hex) of the arrays of all splits."""


def prepare(config: ImageDataConfig, cache_dir: Path) -> PreparedImages:
    """Return the images of a source, from the cache or else made now and cached; safe in parallel processes.

    Raises `UsageError` for a source that cannot be read, a broken image, and classes with too few images to divide.
    """
    meta, arrays = stored(cache_dir / f"images-{source_digest(config)[:24]}-{FORMAT}", lambda: _made(config))
    splits = {
        name: ImageSplit(
            pixel_NHWC=arrays[f"{name}-pixels"],
            label_N=np.asarray(arrays[f"{name}-labels"]),
            domain_N=np.asarray(arrays[f"{name}-domains"]),
        )
        for name in SPLITS
    }
    return PreparedImages(
        **splits,
        classes=tuple(meta["classes"]),
        domains=tuple(meta["domains"]),
        mean_C=np.asarray(arrays["mean"]),
        std_C=np.asarray(arrays["std"]),
        num_skipped=meta["num_skipped"],
        digest=meta["digest"],
    )


def _made(config: ImageDataConfig) -> tuple[dict[str, Any], Arrays]:
    found = read_entries(config)
    entries, pixel_NHWC = decoded(found, config)
    labels = class_names(entries, config)
    domains = sorted({entry.domain for entry in entries})
    label_N = _places([entry.label for entry in entries], labels)
    domain_N = _places([entry.domain for entry in entries], domains)
    classes = [str(label) for label in labels]
    arrays: dict[str, np.ndarray] = {}
    for name, index_N in divide(label_N, [entry.part for entry in entries], classes).items():
        arrays |= {f"{name}-pixels": pixel_NHWC[index_N], f"{name}-labels": label_N[index_N]}
        arrays[f"{name}-domains"] = domain_N[index_N]
    train_NC = arrays["train-pixels"].reshape(-1, config.num_channels)
    arrays["mean"] = (train_NC.mean(0, dtype=np.float64) / 255).astype(np.float32)
    arrays["std"] = np.maximum(train_NC.std(0, dtype=np.float64) / 255, 1e-3).astype(np.float32)
    return {"classes": classes, "domains": domains, "num_skipped": len(found) - len(entries)}, arrays


def decoded(entries: Sequence[Entry], config: ImageDataConfig) -> tuple[list[Entry], np.ndarray]:
    """Return the images that can be read, and their pixels as uint8 [N, size, size, channels].

    Raises `UsageError` naming the first that cannot, or, where these are skipped, when none is left.
    """
    kept, pixels = [], []
    for entry in entries:
        try:
            pixels.append(pixels_of(entry.image, config.size, config.colour))
            kept.append(entry)
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            if not config.skip_broken:
                raise UsageError(
                    f"{config.key}: '{entry.name}' cannot be read as an image ({_reason(error)}); mend or remove it, or"
                    " leave out such images with task.data.skip_broken=true"
                ) from error
    if not kept:
        raise UsageError(f"{config.key}: not one of the {len(entries)} images can be read")
    return kept, np.stack(pixels)


def pixels_of(image: Any, size: int, colour: str) -> np.ndarray:
    """Decode an image (encoded bytes, or the path of a file) to uint8 [size, size, channels]."""
    data = image.read_bytes() if isinstance(image, Path) else image
    if not data:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes and large pictures: both are decoded
        with Image.open(io.BytesIO(data)) as opened:
            picture: Image.Image = opened
            if picture.mode.startswith("I;16"):  # 16 bits: the conversion to 8 would cut, not scale
                picture = Image.fromarray((np.asarray(picture, dtype=np.uint32) >> 8).astype(np.uint8))
            picture = picture.convert("L" if colour == "grey" else "RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)


def divide(label_N: np.ndarray, part_N: Sequence[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the images (int64) of each split, stratified by class: a tenth of a class validates.

    What the source calls test is the test split; without such, another tenth tests. The order within a split is
    drawn, and drawn alike in every process. Raises `UsageError` for a class with too few images.
    """
    parts = np.array(part_N)
    has_test = bool((parts == "test").any())
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(SPLIT_SEED)))
    found: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label, name in enumerate(classes):
        own_N = generator.permutation(np.flatnonzero((label_N == label) & (parts != "test")))
        count = max(round(HELD_BACK * len(own_N)), 1)
        needed = 2 if has_test else 3
        if len(own_N) < needed:
            raise UsageError(
                f"task.data: class '{name}' has {len(own_N)} images beside the test set; it needs at least {needed},"
                " to train and to be held back"
            )
        found["validation"].append(own_N[:count])
        found["test"].append(own_N[count : count * 2] if not has_test else own_N[:0])
        found["train"].append(own_N[count if has_test else count * 2 :])
    found["test"].append(np.flatnonzero(parts == "test"))
    return {name: generator.permutation(np.concatenate(indices)) for name, indices in found.items()}


def _places(values: Sequence[str | int], order: Sequence[str | int]) -> np.ndarray:
    place = {value: index for index, value in enumerate(order)}
    return np.array([place[value] for value in values], dtype=np.int64)


def _reason(error: Exception) -> str:
    text = str(error).split(" <")[0]  # Pillow shows the address of a buffer
    return text.splitlines()[0] if text.strip() else type(error).__name__
