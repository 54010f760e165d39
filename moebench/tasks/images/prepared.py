"""Images as arrays: decoded, divided and kept on disk, then read in place by every run."""

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from moebench.errors import UsageError
from moebench.tasks.cache import Arrays, stored
from moebench.tasks.folders import TEST, TRAIN, VALIDATION, tell_unread
from moebench.tasks.images.config import ImageDataConfig
from moebench.tasks.images.sources import Entry, class_names, read_endings, read_entries, source_digest
from moebench.tasks.sources import check_domain_names, note

FORMAT = 2  # raise it when the decoding, the split or the files change
SPLITS = (TRAIN, VALIDATION, TEST)
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
    tell_unread(config.path, read_endings(config))
    if len(entries) < len(found):
        note(f"{len(found) - len(entries)} of {len(found)} images cannot be read and are left out")
    classes = class_names(entries, config)
    domains = sorted({entry.domain for entry in entries})
    check_domain_names(domains)
    label_N = _places([entry.label for entry in entries], classes)
    domain_N = _places([entry.domain for entry in entries], domains)
    arrays: dict[str, np.ndarray] = {}
    _, key_N = np.unique([hashlib.sha256(pixel.data).digest() for pixel in pixel_NHWC], return_inverse=True)
    splits = divide(label_N, [entry.part for entry in entries], classes, key_N)
    for name, index_N in splits.items():
        arrays |= {f"{name}-pixels": pixel_NHWC[index_N], f"{name}-labels": label_N[index_N]}
        arrays[f"{name}-domains"] = domain_N[index_N]
        repeated = 0 if name == TRAIN else int(np.isin(key_N[index_N], key_N[splits[TRAIN]]).sum())
        if repeated:
            note(f"{repeated} of {len(index_N)} {name} images are trained on too, pixel for pixel")
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
        except Exception as error:  # decoders of a dozen formats raise almost anything
            if not config.skip_broken:
                raise UsageError(
                    f"{config.key}: '{entry.name}' cannot be read as an image ({_reason(error)}); mend or remove it, or"
                    " leave out such images with task.data.skip_broken=true"
                ) from error
    if not kept:
        raise UsageError(f"{config.key}: not one of the {len(entries)} images can be read")
    return kept, np.stack(pixels)


def pixels_of(image: Any, size: int, colour: str) -> np.ndarray:
    """Decode an image (encoded bytes, or the path of a file) to uint8 [size, size, channels], as a viewer shows it.

    The first picture of several counts, turned as its camera says; what is transparent lies on white.
    """
    data = image.read_bytes() if isinstance(image, Path) else image
    if not data:
        raise ValueError("it is empty")
    if not isinstance(data, bytes):
        raise TypeError(f"it is {type(data).__name__}, neither bytes nor the name of a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes and large pictures: both are decoded
        with Image.open(io.BytesIO(data)) as opened:
            picture = _eight_bits(ImageOps.exif_transpose(opened), opened.format)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if colour == "grey" else "RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)


def _eight_bits(picture: Image.Image, kind: str | None) -> Image.Image:
    """Return a picture of at most 8 bits per number: the conversion of others would cut and not scale.

    `kind`: the format of its file; portable grey maps hold 16 bits in wider numbers. Raises ValueError where nothing
    says what is white.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    if picture.mode == "F" or (picture.mode == "I" and kind not in ("PPM", "PNG")):
        raise ValueError("its numbers have 32 bits, and nothing says which is white: store 8 or 16 bits")
    return Image.fromarray((np.asarray(picture, dtype=np.uint32) >> 8).astype(np.uint8))


def divide(
    label_N: np.ndarray, part_N: Sequence[str], classes: Sequence[str], key_N: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the images (int64) of each split, stratified by class.

    What the source calls validation and test stays so; for each of the two that it lacks, a tenth of what else there
    is of a class is held back. Equal images of a class, by `key_N`, stay together. The order within a split is drawn,
    and drawn alike in every process. Raises `UsageError` for a class with too few images.
    """
    parts = np.array(part_N)
    lacking = [name for name in (VALIDATION, TEST) if not (parts == name).any()]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(SPLIT_SEED)))
    found: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label, name in enumerate(classes):
        own_N = generator.permutation(np.flatnonzero((label_N == label) & (parts == TRAIN)))
        own_N, copy_N = _copies_together(own_N, key_N[own_N])
        number = 0 if len(copy_N) == 0 else int(copy_N[-1]) + 1
        if number <= len(lacking):
            raise UsageError(
                f"task.data: class '{name}' has {number} different images to train on and to hold back; it needs at"
                f" least {1 + len(lacking)}"
            )
        start, count = 0, max(round(HELD_BACK * len(own_N)), 1)
        for place, held_back in enumerate(lacking):
            # Up to the last copy of the image that fills the share, and leaving one for each that comes behind.
            last = min(int(copy_N[min(start + count, len(own_N)) - 1]), number - len(lacking) + place - 1)
            end = int(np.searchsorted(copy_N, last, side="right"))
            found[held_back].append(own_N[start:end])
            start = end
        found[TRAIN].append(own_N[start:])
    for name in (VALIDATION, TEST):
        found[name].append(np.flatnonzero(parts == name))
    return {name: generator.permutation(np.concatenate(indices)) for name, indices in found.items()}


def _copies_together(index_N: np.ndarray, key_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images with equal ones side by side, and the number of each image when equal ones count once."""
    _, first, unique_N = np.unique(key_N, return_index=True, return_inverse=True)
    copy_N = first.argsort().argsort()[unique_N]
    order_N = np.argsort(copy_N, kind="stable")
    return index_N[order_N], copy_N[order_N]


def _places(values: Sequence[str], order: Sequence[str]) -> np.ndarray:
    place = {value: index for index, value in enumerate(order)}
    return np.array([place[value] for value in values], dtype=np.int64)


def _reason(error: Exception) -> str:
    text = str(error).split(" <")[0]  # Pillow shows the address of a buffer
    return text.splitlines()[0][:200] if text.strip() else type(error).__name__
