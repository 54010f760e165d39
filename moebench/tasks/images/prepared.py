"""Images as arrays: decoded, split, cached, and memory-mapped by every run."""

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
from moebench.tasks.cache import Arrays, load_or_create
from moebench.tasks.folders import TEST, TRAIN, VALIDATION, warn_unread_files
from moebench.tasks.images.sources import Entry, ImageDataConfig, class_names, read_endings, read_entries, source_digest
from moebench.tasks.sources import check_domain_names, warn

FORMAT = 2
"""Part of the name in the cache: raised when the decoding, the split or the files change."""
SPLITS = (TRAIN, VALIDATION, TEST)
HELD_OUT_SHARE = 0.1
"""Share of each class for the validation split, and for the test split if the source has none."""
SPLIT_SEED = 20220905


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSplit:
    """One split in random order, so that its first images are a fair sample."""

    pixel_NHWC: np.ndarray
    """uint8 [image, row, column, channel], memory-mapped."""
    label_N: np.ndarray
    """int64 index into `PreparedImages.classes`."""
    domain_N: np.ndarray
    """int64 index into `PreparedImages.domains`."""

    def select(self, index_N: np.ndarray) -> "ImageSplit":
        """Return the images with the given indices."""
        return ImageSplit(
            pixel_NHWC=self.pixel_NHWC[index_N], label_N=self.label_N[index_N], domain_N=self.domain_N[index_N]
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImages:
    """The three splits of a source of images, with classes, domains and statistics."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    mean_C: np.ndarray
    """Mean of each channel over the training split, where white is 1 (float32)."""
    std_C: np.ndarray
    """Standard deviation of each channel over the training split (float32)."""
    num_skipped: int
    """Number of images that could not be read."""
    digest: str
    """SHA-256 (hex) of the arrays of all splits."""


def prepare(config: ImageDataConfig, cache_dir: Path) -> PreparedImages:
    """Return the images of a source from the cache, decoding them first if needed; safe in parallel processes.

    Raises UsageError for a source that cannot be read, a broken image, and a class with too few images to split.
    """
    meta, arrays = load_or_create(
        cache_dir / f"images-{source_digest(config)[:24]}-{FORMAT}", lambda: _decode_source(config)
    )
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


def _decode_source(config: ImageDataConfig) -> tuple[dict[str, Any], Arrays]:
    listed = read_entries(config)
    entries, pixel_NHWC = decode_entries(listed, config)
    warn_unread_files(config.path, read_endings(config))
    num_skipped = len(listed) - len(entries)
    if num_skipped:
        warn(f"{num_skipped} of {len(listed)} images cannot be read and are skipped")
    classes = class_names(entries, config)
    domains = sorted({entry.domain for entry in entries})
    check_domain_names(domains)
    label_N = _indices([entry.label for entry in entries], classes)
    domain_N = _indices([entry.domain for entry in entries], domains)
    arrays: dict[str, np.ndarray] = {}
    _, key_N = np.unique([hashlib.sha256(pixel.data).digest() for pixel in pixel_NHWC], return_inverse=True)
    splits = split_images(label_N, [entry.part for entry in entries], classes, key_N)
    for name, index_N in splits.items():
        arrays |= {f"{name}-pixels": pixel_NHWC[index_N], f"{name}-labels": label_N[index_N]}
        arrays[f"{name}-domains"] = domain_N[index_N]
        repeated = 0 if name == TRAIN else int(np.isin(key_N[index_N], key_N[splits[TRAIN]]).sum())
        if repeated:
            warn(f"{repeated} of {len(index_N)} {name} images are also in the training split, pixel for pixel")
    train_NC = arrays["train-pixels"].reshape(-1, config.num_channels)
    arrays["mean"] = (train_NC.mean(0, dtype=np.float64) / 255).astype(np.float32)
    arrays["std"] = np.maximum(train_NC.std(0, dtype=np.float64) / 255, 1e-3).astype(np.float32)
    return {"classes": classes, "domains": domains, "num_skipped": num_skipped}, arrays


def decode_entries(entries: Sequence[Entry], config: ImageDataConfig) -> tuple[list[Entry], np.ndarray]:
    """Return the entries that can be read, and their pixels as uint8 [N, size, size, channels].

    Raises UsageError for the first entry that cannot be read or, with `skip_broken`, if no entry can.
    """
    kept, pixels = [], []
    for entry in entries:
        try:
            pixels.append(decode_image(entry.image, config.size, config.colour))
            kept.append(entry)
        except Exception as error:  # of many kinds, from the decoders of a dozen formats
            if not config.skip_broken:
                raise UsageError(
                    f"{config.key}: '{entry.name}' cannot be read as an image ({_reason(error)}); repair or remove it,"
                    " or skip such images with task.data.skip_broken=true"
                ) from error
    if not kept:
        raise UsageError(f"{config.key}: none of the {len(entries)} images can be read")
    return kept, np.stack(pixels)


def decode_image(image: Any, size: int, colour: str) -> np.ndarray:
    """Decode an image (encoded bytes, or the path of a file) to uint8 [size, size, channels], as a viewer shows it.

    Only the first frame is used, rotated by its EXIF orientation, on a white background if it is transparent.
    """
    data = image.read_bytes() if isinstance(image, Path) else image
    if not data:
        raise ValueError("it is empty")
    if not isinstance(data, bytes):
        raise TypeError(f"it is {type(data).__name__}, neither bytes nor the name of a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes and large images
        with Image.open(io.BytesIO(data)) as opened:
            picture = _to_eight_bits(ImageOps.exif_transpose(opened), opened.format)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if colour == "grey" else "RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)


def _to_eight_bits(picture: Image.Image, kind: str | None) -> Image.Image:
    """Return a picture with at most 8 bits per channel, which Pillow would clip instead of scaling.

    `kind` is the file format: PGM and PNG hold 16 bits in mode I. Raises ValueError if the value of white is unknown.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    if picture.mode == "F" or (picture.mode == "I" and kind not in ("PPM", "PNG")):
        raise ValueError("its pixels have 32 bits, and the value of white is unknown: store 8 or 16 bits")
    return Image.fromarray((np.asarray(picture, dtype=np.uint32) >> 8).astype(np.uint8))


def split_images(
    label_N: np.ndarray, part_N: Sequence[str], classes: Sequence[str], key_N: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the indices (int64) of the images of each split, stratified by class, in random order.

    Validation and test splits of the source are kept; for each one that it lacks, a tenth of the other images of every
    class is held out. Equal images of a class, by `key_N`, stay together. The seed is fixed. Raises UsageError for a
    class with too few images.
    """
    parts = np.array(part_N)
    lacking = [name for name in (VALIDATION, TEST) if not (parts == name).any()]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(SPLIT_SEED)))
    members: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label, name in enumerate(classes):
        class_N = generator.permutation(np.flatnonzero((label_N == label) & (parts == TRAIN)))
        class_N, copy_N = _group_copies(class_N, key_N[class_N])
        number = 0 if len(copy_N) == 0 else int(copy_N[-1]) + 1
        if number <= len(lacking):
            raise UsageError(
                f"task.data: class '{name}' has {number} different images to train on and to hold out; it needs at"
                f" least {1 + len(lacking)}"
            )
        start, count = 0, max(round(HELD_OUT_SHARE * len(class_N)), 1)
        for i, split in enumerate(lacking):
            # Up to the last copy of the image that fills the share, leaving one image for each following split.
            last = min(int(copy_N[min(start + count, len(class_N)) - 1]), number - len(lacking) + i - 1)
            end = int(np.searchsorted(copy_N, last, side="right"))
            members[split].append(class_N[start:end])
            start = end
        members[TRAIN].append(class_N[start:])
    for name in (VALIDATION, TEST):
        members[name].append(np.flatnonzero(parts == name))
    return {name: generator.permutation(np.concatenate(indices)) for name, indices in members.items()}


def _group_copies(index_N: np.ndarray, key_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images with equal ones adjacent, and the number of each image where equal ones have the same."""
    _, first, unique_N = np.unique(key_N, return_index=True, return_inverse=True)
    copy_N = first.argsort().argsort()[unique_N]
    order_N = np.argsort(copy_N, kind="stable")
    return index_N[order_N], copy_N[order_N]


def _indices(values: Sequence[str], order: Sequence[str]) -> np.ndarray:
    index_of = {value: index for index, value in enumerate(order)}
    return np.array([index_of[value] for value in values], dtype=np.int64)


def _reason(error: Exception) -> str:
    text = str(error).split(" <")[0]  # Pillow appends the address of a buffer
    return text.splitlines()[0][:200] if text.strip() else type(error).__name__
