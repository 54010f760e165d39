"""Which images to train on, and what they become."""

from dataclasses import dataclass, field
from typing import Literal

from moebench.errors import require, unknown
from moebench.tasks.sources import check_source

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EMBEDDED = {"fashion": FASHION, "mnist": tuple(str(digit) for digit in range(10))}
"""The image sets that moebench carries, with their classes in the order of their labels."""


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Where images come from and how they become arrays; by default 24,000 of Fashion-MNIST, which moebench carries."""

    sources: list[str] = field(default_factory=lambda: ["fashion"])
    """Embedded sets, each a domain with its own ten classes: fashion, mnist or both."""
    path: str | None = None
    """Instead: a folder of images with one subfolder for each class, or .parquet, .csv, .jsonl or .json with a column
    of images (bytes or file names) and one of labels. What lies in folders, or in tables, called train, validation
    (val, valid, dev) and test is not mixed."""
    dataset: str | None = None
    """Instead: name of a data set on the Hugging Face hub."""
    config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str = "train"
    """Split of the hub data set to read."""
    test_split: str | None = None
    """Split of the hub data set that is the test set; null takes a tenth of `split`."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; a commit makes the data reproducible."""
    image_column: str = "image"
    """Column that holds the image."""
    label_column: str = "label"
    """Column that holds the class: numbers or names."""
    domain_column: str | None = None
    """Column that names the domain; null: all images are one domain, 'all'."""
    size: int = 28
    """Height and width in pixels; other images are resized, their proportions given up."""
    colour: Literal["grey", "rgb"] = "grey"
    """One channel or three."""
    held_out_classes: list[int] = field(default_factory=list)
    """Classes (counted from 0) that are neither trained nor tested on, for the probe on few images."""
    skip_broken: bool = False
    """Leave out images that cannot be read and count them (metric skipped_images), instead of stopping at the first."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        check_source(self, ("test_split", "image_column", "label_column", "domain_column"))
        for source in self.sources:
            if source not in EMBEDDED:
                raise unknown("task.data.sources", source, EMBEDDED)
        once = len(set(self.sources)) == len(self.sources) > 0
        require(once, "task.data.sources", self.sources, "a list that names each of fashion and mnist at most once")
        require(self.size >= 1, "task.data.size", self.size, "at least 1")
        held_out = self.held_out_classes
        fits = len(set(held_out)) == len(held_out) and all(label >= 0 for label in held_out)
        require(fits, "task.data.held_out_classes", held_out, "a list of different classes, counted from 0")

    @property
    def is_embedded(self) -> bool:
        """Whether the images are those that moebench carries."""
        return self.path is None and self.dataset is None

    @property
    def key(self) -> str:
        """The key that names the source, for errors."""
        return "task.data.dataset" if self.dataset else "task.data.path" if self.path else "task.data.sources"

    @property
    def num_channels(self) -> int:
        """Numbers per pixel."""
        return 1 if self.colour == "grey" else 3
